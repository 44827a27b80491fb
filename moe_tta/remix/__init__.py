# SPDX-License-Identifier: Apache-2.0
"""Neighbour re-mixing: solved questions, their expert pathways, and what to borrow.

A pathway is the routing distribution [L, E] of a prompt's last token: what the model's
routers gave it in each MoE layer, before experts are chosen.
"""
