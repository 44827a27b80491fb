# SPDX-License-Identifier: Apache-2.0
"""Answers of MATH: where they stand, and when two are one."""

import pytest

from benchmarks.quality.latex import latex_answer, normal


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1}, no: $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"The final answer is $\frac12$. I hope it is correct.", r"\frac{1}{2}"),
        ("The final answer is 3.5. I hope", "3.5"),
        ("first $a=1$, so that $x=5$.", "5"),
        (r"cut off in \boxed{\frac{1}{2", None),
        ("nothing", None),
    ],
)
def test_where_the_answer_stands(text, answer):
    assert latex_answer(text) == answer


@pytest.mark.parametrize(
    "same",
    [
        [r"\dfrac{9}{7}", r"\frac97", r"\tfrac 9 7", r"\frac{9}7", r"\frac9{7}"],
        [r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"],
        [r"15\text{ cm}^2", r"15 \mbox{ inches}", "15", "15.", "15.0", r"x = 15"],
        [r"\$32,\!348", "32348", "32,348"],
        [r"\text{Evelyn}", "Evelyn"],
        [r"90^\circ", r"90^{\circ}", "90"],
        [".5", "0.5"],
        [
            r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}",
            r"\begin{pmatrix}1\\-2\end{pmatrix}",
        ],
    ],
)
def test_one_answer_in_several_ways(same):
    assert len({normal(answer) for answer in same}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [("3,5,7", "357"), ("1.5", "15"), ("-2", "2"), (r"\frac12", "12"), ("10", "100")],
)
def test_other_answers(one, other):
    assert normal(one) != normal(other)
