# SPDX-License-Identifier: Apache-2.0
"""Neighbour re-mixing on multiple choice: references, batches, arms.

Source: C3PO, arXiv 2504.07964, section 4.
"""
