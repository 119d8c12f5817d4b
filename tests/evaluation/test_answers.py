r"""Grading of mathematics: several answers, right answers read whole, small numbers, other dress.

Each kind has right and wrong answers; the first cases of each come from public bug reports (Math-Verify, sieval,
lm-evaluation-harness), the others are ours. Where a case has no box, none is added.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from math_verify.errors import TimeoutException

from tah.evaluation import answers
from tah.evaluation.answers import grade_math, judge_math, read_math
from tah.evaluation.grading.reply import Verdict, boxes
from tah.evaluation.tasks import rows

DATA = Path(__file__).parent
SEVERAL = [
    ("1,-2", r"The solutions are $\boxed{1}$ and $\boxed{-2}$.", "right"),
    ("69,84", r"\boxed{69}, \boxed{84}", "right"),
    ("-3,7", r"Hence $x=\boxed{7}$ or $x=\boxed{-3}$.", "right"),
    ("4,9", r"First $\boxed{4}$. Then, for the second case, $\boxed{9}$.", "right"),
    ("5", r"I first thought \boxed{3}, but that is wrong. So the answer is \boxed{5}.", "right"),
    ("1,-2", r"$\boxed{1}$ and $\boxed{-3}$", "wrong"),
    # one box with a list, in any order and writing
    ("1,-2", r"\boxed{1,-2}", "right"),
    ("1,-2", r"\boxed{-2, 1}", "right"),
    ("1,-2", r"\boxed{1 \text{ and } -2}", "right"),
    ("1,-2", r"\boxed{x=1 \text{ or } x=-2}", "right"),
    ("1,-2", r"\boxed{\{1,-2\}}", "right"),
    ("1,-2", r"\boxed{\left\{-2, 1\right\}}", "right"),
    ("1,-2", r"\boxed{x \in \{1, -2\}}", "right"),
    ("1,-2", r"\boxed{(1,-2)}", "right"),
    ("1,-2", r"\boxed{1;\ -2}", "right"),
    ("1,-2", r"\boxed{x_1 = 1, \quad x_2 = -2}", "right"),
    ("$1$ and $-2$", r"\boxed{-2,1}", "right"),
    (r"$1$ or $-2$", r"\boxed{-2} or \boxed{1}", "right"),
    (r"\{1,-2\}", r"\boxed{1}, \boxed{-2}", "right"),
    (r"k=3,-2", r"\boxed{k=3} and \boxed{k=-2}", "right"),
    (r"k=3,-2", r"\boxed{3}, \boxed{-2}", "right"),
    (r"\pm 2", r"\boxed{2} \text{ and } \boxed{-2}", "right"),
    (r"\pm 2", r"\boxed{-2,2}", "right"),
    (r"2,-2", r"\boxed{\pm 2}", "right"),
    (r"1 \pm \sqrt{2}", r"\boxed{1+\sqrt2}, \boxed{1-\sqrt{2}}", "right"),
    (r"\frac{1}{2},-3", r"\boxed{-3}, \boxed{0.5}", "right"),
    (r"(1,2),(3,4)", r"\boxed{(1,2)} and \boxed{(3,4)}", "right"),
    (r"$(1,2),(3,4)$", r"\boxed{(3,4),(1,2)}", "right"),
    (r"(1,8,19),(2,7,13),(4,5,7)", r"\boxed{(1,8,19)}, \boxed{(2,7,13)}, \boxed{(4,5,7)}", "right"),
    (r"2^{k}, k \geq 1", r"\boxed{2^k, k \ge 1}", "right"),
    (r"2^{k}, k \geq 1", r"\boxed{2^k \text{ for } k \ge 1}", "right"),
    (r"x=1, y=2", r"\boxed{x=1}, \boxed{y=2}", "right"),
    (r"x=1, y=2", r"\boxed{y=2, x=1}", "right"),
    (r"x=1, y=2", r"\boxed{1}, \boxed{2}", "right"),
    (r"x=1, y=2", r"\boxed{2}, \boxed{1}", "wrong"),
    (r"(1,2)", r"$x=\boxed{1}$, $y=\boxed{2}$", "right"),
    (r"(x,y)=(1,2)", r"\boxed{(1,2)}", "right"),
    (r"(1,2)", r"$x=\boxed{2}$, $y=\boxed{1}$", "wrong"),
    ("5, 7, 11", r"\boxed{5}, \boxed{7}, and \boxed{11}", "right"),
    ("5, 7, 11", "- $\\boxed{5}$\n- $\\boxed{7}$\n- $\\boxed{11}$", "right"),
    ("100, 200", r"\boxed{100, 200}", "right"),
    ("100, 200", r"\boxed{100} and \boxed{200}", "right"),
    ("1,-2,300", r"\boxed{300,1,-2}", "right"),
    # the boxes of the final statement, not those before it
    ("1,-2", r"We find \boxed{1}. Also \boxed{-2}. So the answer is \boxed{1,-2}.", "right"),
    ("1,-2", r"$x=\boxed{1}$ or $x=\boxed{-2}$. Therefore the solutions are \boxed{1} and \boxed{-2}.", "right"),
    ("1,-2", r"First try: \boxed{3}. Wait, no: \boxed{1} and \boxed{-2}.", "right"),
    ("1,-2", r"The sum is \boxed{-1}. The roots are \boxed{1} and \boxed{-2}.", "right"),
    ("1,-2", r"Case 1 gives \boxed{1}. Case 2 gives \boxed{-2}. Case 3 gives \boxed{1} again.", "right"),
    ("1,-2", r"The roots are \boxed{1} and the other one is \boxed{-2}.", "right"),
    ("69,84", r"\boxed{69} degrees and \boxed{84} degrees", "right"),
    ("12", r"\boxed{7}. Wait, no: \boxed{12}", "right"),
    ("7", r"\boxed{7}. Wait, no: \boxed{12}", "wrong"),
    ("12", r"Area \boxed{3}. Perimeter \boxed{5}. In all \boxed{12}.", "right"),
    ("5", r"\boxed{5} and \boxed{5}", "right"),
    ("0.5", r"\boxed{\frac12} or \boxed{0.5}", "right"),
    # forms of OlympiadBench
    (r"$\angle B E A_{1}=90$,$\angle A E B_{1}=90$", r"Both are \boxed{90^\circ}.", "right"),
    (r"$\angle B E A_{1}=90$,$\angle A E B_{1}=60$", r"\boxed{90^\circ} and \boxed{60^\circ}", "right"),
    ("$2,-1,-18$", r"\boxed{a=2, h=-1, k=-18}", "right"),
    ("$10^{3},10$", r"\boxed{(1000, 10)}", "right"),
    (r"$m_{\max }=n^{2}-n-1$", r"\boxed{n^2-n-1}", "right"),
    ("$6764$,$10945$", r"$e(18)=\boxed{6764}$ and $e(19)=\boxed{10945}$", "right"),
    ("19,0,1", r"$x=\boxed{19}$, $y=\boxed{0}$, $z=\boxed{1}$", "right"),
    ("$f(x)=x$,$f(x)=2-x$", r"\boxed{f(x)=x} and \boxed{f(x)=2-x}", "right"),
    (r"(-\infty,-1],[1,\infty)", r"\boxed{(-\infty,-1] \cup [1,\infty)}", "right"),
    # members, and more than was asked for
    ("5", r"\boxed{5}, \boxed{7}", "wrong"),
    ("5", r"\boxed{7} or \boxed{5}", "wrong"),
    ("5", r"\boxed{5,7}", "wrong"),
    ("7", r"\boxed{5} cm or \boxed{7} cm", "wrong"),
    ("1,-2", r"\boxed{1}", "wrong"),
    ("1,-2", r"\boxed{-2}", "wrong"),
    ("1,-2", r"\boxed{1}, \boxed{-2}, \boxed{3}", "wrong"),
    ("1,-2", r"\boxed{1,-2,0}", "wrong"),
    ("1,-2", r"\boxed{1}. That is wrong. \boxed{-2}", "wrong"),
    ("1,-2", r"\boxed{1}. No, it is \boxed{-2}.", "wrong"),
    ("1,-2", r"\boxed{1}. There is no other positive root. The negative one is \boxed{-2}.", "right"),
    ("1,-2", r"\boxed{-1,2}", "wrong"),
    (r"\pm 2", r"\boxed{2}", "wrong"),
    (r"(1,2),(3,4)", r"\boxed{(1,2)}", "wrong"),
    (r"(1,2),(3,4)", r"\boxed{(2,1),(3,4)}", "wrong"),
    (r"(1,2)", r"\boxed{(2,1)}", "wrong"),
    (r"2^{k}, k \geq 1", r"\boxed{2^k}", "wrong"),
    (r"2^{k}, k \geq 1", r"\boxed{2^k, k \ge 2}", "wrong"),
    (r"1 \pm \sqrt{2}", r"\boxed{1+\sqrt2}", "wrong"),
    ("[1,3]", r"\boxed{1}, \boxed{3}", "wrong"),
    ("1,800", r"\boxed{1}, \boxed{8}, \boxed{800}", "wrong"),
    ("90,120", r"\boxed{90^\circ} and \boxed{120^\circ}", "right"),
    ("90,120", r"\boxed{120}, \boxed{90}", "right"),
    ("90,120", r"\boxed{90120}", "right"),
    ("90,120", r"\boxed{90} and \boxed{121}", "wrong"),
    ("90,120", r"\boxed{120}", "wrong"),
    ("1,800", r"\boxed{1800}", "right"),
    ("1,800", r"\boxed{1}", "wrong"),
    ("x=1, y=2", r"\boxed{x=2, y=1}", "wrong"),
    # without boxes
    ("1,-2", "The solutions are $1$ and $-2$.", "right"),
    ("1,-2", "The answers are 1 and -2.", "right"),
    ("1,-2", "The answer is 1.", "wrong"),
]

WHOLE = [
    (r"(-\infty, 0) \cup\{1\}$.", r"\boxed{(-\infty, 0) \cup\{1\}}", "right"),
    (r"(-\infty, 0) \cup\{1\}$.", r"\boxed{0}", "wrong"),
    (r"m_{p} c^{2}\left(\gamma^{2}-1\right)", r"\boxed{m_{p} c^{2}\left(\gamma^{2}-3\right)}", "wrong"),
    (r"m_{p} c^{2}\left(\gamma^{2}-1\right)", r"\boxed{m_p c^2 (\gamma-1)(\gamma+1)}", "right"),
    ("east", r"\boxed{teas}", "wrong"),
    ("east", r"\boxed{\text{East}}", "right"),
    ("east", "The answer is east.", "right"),
    ("east", r"\boxed{west}", "wrong"),
    (r"\gamma^2-1", r"\boxed{\gamma^2-2}", "wrong"),
    (r"\gamma^2-1", r"\boxed{-1+\gamma^{2}}", "right"),
    ("E_1", r"\boxed{1}", "wrong"),
    ("E_1", r"\boxed{E_2}", "wrong"),
    ("E_1", r"\boxed{E_{1}}", "right"),
    (r"E_1+E_2", r"\boxed{E_2+E_1}", "right"),
    (r"E_1+E_2", r"\boxed{E_1}", "wrong"),
    ("120_8", r"\boxed{120_{8}}", "right"),
    ("120_8", r"\boxed{120_9}", "wrong"),
    ("120_8", r"\boxed{120}", "wrong"),
    ("3t", r"\boxed{3}", "wrong"),
    ("3x-2t", r"\boxed{3x-2}", "wrong"),
    ("x'", r"\boxed{x}", "wrong"),
    ("R-r", r"\boxed{0}", "wrong"),
    ("R-r", r"\boxed{-r+R}", "right"),
    (r"\frac{R-r}{R+r}", r"\boxed{\frac{r-R}{R+r}}", "wrong"),
    (r"\omega-\Omega", r"\boxed{0}", "wrong"),
    ("1+2+\\ldots+n", r"\boxed{1+2+n}", "wrong"),
    ("1+2+\\ldots+n", r"\boxed{1+2+\ldots+n}", "right"),
    (r"\{x \mid x>2\}", r"\boxed{(2,\infty)}", "right"),
    (r"\{x \mid x>2\}", r"\boxed{2}", "wrong"),
    (r"n \equiv 1 \pmod 3", r"\boxed{n \equiv 1 \pmod{3}}", "right"),
    (r"n \equiv 1 \pmod{3}", r"\boxed{n\equiv 1\pmod{3}}", "right"),
    (r"n \equiv 1 \pmod{3}", r"\boxed{1}", "wrong"),
    ("yes", r"\boxed{\text{Yes}}", "right"),
    ("yes", r"\boxed{\text{No}}", "wrong"),
    ("no", r"\boxed{on}", "wrong"),
    ("all odd primes", r"\boxed{\text{all odd primes}}", "right"),
    ("all odd primes", r"\boxed{\text{all primes}}", "wrong"),
    (r"\text{even}", r"\boxed{\text{odd}}", "wrong"),
    ("abc", r"\boxed{cab}", "right"),
    ("2xyz", r"\boxed{2zyx}", "right"),
    (r"I(0)e^{-t/RC}", r"\boxed{I(0)e^{-t/RC}}", "right"),
    (r"y''+y=0", r"\boxed{y+y=0}", "wrong"),
    (r"y''+y=0", r"\boxed{y''+y=0}", "right"),
    ("x^2+y^2=1", r"\boxed{1}", "wrong"),
    ("x^2+y^2=1", r"\boxed{x^2+y^2}", "wrong"),
    ("x=5", r"\boxed{5}", "right"),
    ("5", r"\boxed{x=5}", "right"),
]

SMALL = [
    ("2.88e-19", r"\boxed{4.88e-19}", "wrong"),
    ("2.88e-19", r"\boxed{10^{-20}}", "wrong"),
    ("4.6e-24", r"\boxed{6.6e-24}", "wrong"),
    (r"\frac{1}{2^{99}}", r"\boxed{\frac{1}{2^{98}}}", "wrong"),
    ("2.88e-19", r"\boxed{2.88 \times 10^{-19}}", "right"),
    ("2.88e-19", r"\boxed{28.8 \cdot 10^{-20}}", "right"),
    ("2.88e-19", r"\boxed{2.88e-19}", "right"),
    ("2.88e-19", r"\boxed{2.88 \times 10^{-19} \text{ J}}", "right"),
    ("2.88e-19", r"\boxed{2.8800001e-19}", "right"),
    ("2.88e-19", r"\boxed{2.881e-19}", "wrong"),
    ("2.88e-19", r"\boxed{-2.88e-19}", "wrong"),
    ("2.88e-19", r"\boxed{0}", "wrong"),
    ("0", r"\boxed{2.88e-19}", "wrong"),
    ("0", r"\boxed{10^{-20}}", "wrong"),
    ("0", r"\boxed{\frac{1}{2^{80}}}", "wrong"),
    ("0", r"\boxed{0.0}", "right"),
    ("0", r"\boxed{\sqrt{8}-2\sqrt{2}}", "right"),
    (r"\frac{1}{2^{99}}", r"\boxed{2^{-99}}", "right"),
    (r"\frac{1}{2^{99}}", r"\boxed{1.5777218104420236 \times 10^{-30}}", "right"),
    (r"\frac{1}{2^{400}}", r"\boxed{\frac{1}{4^{200}}}", "right"),
    (r"\frac{1}{2^{400}}", r"\boxed{\frac{1}{4^{201}}}", "wrong"),
    ("1e-7", r"\boxed{3e-7}", "wrong"),
    ("1e-7", r"\boxed{0.0000001}", "right"),
    ("6.626e-34", r"\boxed{h = 6.626 \times 10^{-34}}", "right"),
    ("6.626e-34", r"\boxed{h = 6.626 \times 10^{-33}}", "wrong"),
    ("E=2.88e-19", r"\boxed{E=4.88e-19}", "wrong"),
    ("E=2.88e-19", r"\boxed{2.88e-19}", "right"),
    ("(1e-19,2e-19)", r"\boxed{(1e-19,2e-19)}", "right"),
    ("(1e-19,2e-19)", r"\boxed{(1e-19,3e-19)}", "wrong"),
    ("1e-19,2e-19", r"\boxed{2e-19},\boxed{1e-19}", "right"),
    ("1e-19,2e-19", r"\boxed{1e-19},\boxed{4e-19}", "wrong"),
    ("[0,2e-19]", r"\boxed{[0,3e-19]}", "wrong"),
    (r"\begin{pmatrix}10^{-19}\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}10^{-18}\\2\end{pmatrix}}", "wrong"),
    (r"\begin{pmatrix}10^{-19}\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}1e-19\\2\end{pmatrix}}", "right"),
    (r"10^{-19} x", r"\boxed{10^{-18} x}", "wrong"),
    (r"2.5e-19 x", r"\boxed{4.5e-19 x}", "wrong"),
    (r"2.5e-19 x", r"\boxed{x \cdot 2.5e-19}", "right"),
    ("6.02e23", r"\boxed{602000000000000000000000}", "right"),
    ("6.02e23", r"\boxed{6.03e23}", "wrong"),
    ("0.333333", r"\boxed{\frac13}", "right"),
    ("0.333", r"\boxed{\frac13}", "wrong"),
]

DRESS = [
    ("42", r"So the answer is $\boxed{42.}$.", "right"),
    (r"\frac12", r"So the answer is $\boxed{\frac{1}{2}.}$.", "right"),
    ("70000", r"So the answer is $\boxed{70 000}$.", "right"),
    ("90", r"So the answer is $\boxed{90°}$.", "right"),
    ("18", r"So the answer is $\boxed{18 dollars}$.", "right"),
    ("5", r"So the answer is $\boxed{5 km/h}$.", "right"),
    ("-5", "The answer is \u22125.", "right"),
    ("-5", "x = \u22125", "right"),
    ("1800", r"The total is \$1,800.", "right"),
    ("5", r"\boxed{5}. (As asked, in \boxed{}.)", "right"),
    (r"\frac{1+i}{2}", r"So the answer is $\boxed{0.5+0.5i}$.", "right"),
    ("5", r"So the answer is $\boxed{\text{Answer: } 5}$.", "right"),
    (r"\frac54", r"So the answer is $\boxed{1 1/4}$.", "right"),
    ("[1,3]", r"So the answer is $\boxed{1 \le x \le 3}$.", "right"),
    (r"\frac{5}{8}", r"Wrong: \boxed{3}. Right: \boxed{\frac{1}{1+\frac{1}{1+\frac{1}{1+\frac{1}{1+1}}}}}", "right"),
    # full stops and spaces
    ("42", r"\boxed{42\text{.}}", "right"),
    ("42", r"\boxed{43.}", "wrong"),
    ("0.5", r"\boxed{.5}", "right"),
    ("70000", r"\boxed{70\,000}", "right"),
    ("70000", "\\boxed{70\u202f000}", "right"),
    ("70000", "\\boxed{70\u00a0000}", "right"),
    ("70000", r"\boxed{70{,}000}", "right"),
    ("1234567", r"\boxed{1\ 234\ 567}", "right"),
    ("70000", r"\boxed{70 00}", "wrong"),
    ("70000", r"\boxed{7 000}", "wrong"),
    # signs
    ("90", r"\boxed{90^\circ}", "right"),
    ("90^\\circ", r"\boxed{90}", "right"),
    ("90", r"\boxed{90^{\circ}}", "right"),
    ("90", r"\boxed{90 \text{ degrees}}", "right"),
    ("90", r"\boxed{9°}", "wrong"),
    ("-5", "\\boxed{\u22125}", "right"),
    ("5", "\\boxed{\u22125}", "wrong"),
    (r"2\pi", "\\boxed{2π}", "right"),
    ("2\\sqrt{3}", "\\boxed{2√3}", "right"),
    ("x^2", "\\boxed{x²}", "right"),
    ("[2,\\infty)", "\\boxed{x ≥ 2}", "right"),
    # units and currency
    ("18", r"\boxed{\$18}", "right"),
    ("18", r"\boxed{\$18.00}", "right"),
    ("18", r"\boxed{18\text{ dollars}}", "right"),
    ("18", "\\boxed{€18}", "right"),
    ("18", r"\boxed{18 \text{ eggs}}", "right"),
    ("18", r"\boxed{18 apples}", "right"),
    ("5", r"\boxed{5\text{ m/s}^2}", "right"),
    ("5", r"\boxed{5 \frac{\text{m}}{\text{s}}}", "right"),
    ("5", r"\boxed{5\,\mathrm{cm}^2}", "right"),
    (r"12\pi", r"\boxed{12\pi \text{ cm}^3}", "right"),
    (r"10\text{ cm}", r"\boxed{10}", "right"),
    (r"10\text{ cm}", r"\boxed{10 \text{ centimeters}}", "right"),
    (r"10\text{ cm}", r"\boxed{10 cm}", "right"),
    (r"10\text{ cm}", r"\boxed{10\text{ m}}", "wrong"),
    (r"10\text{ cm}", r"\boxed{10\text{ cm}^2}", "wrong"),
    ("5 km", r"\boxed{5 km}", "right"),
    ("5 km", r"\boxed{5 m}", "wrong"),
    ("5 km", r"\boxed{6 km}", "wrong"),
    (r"\$18", r"\boxed{18 dollars}", "right"),
    (r"\$18", r"\boxed{18 cents}", "wrong"),
    ("5", r"\boxed{5 million}", "wrong"),
    ("5000000", r"\boxed{5 million}", "right"),
    ("5", r"\boxed{5 dozen}", "wrong"),
    ("5", r"\boxed{5 \text{ hundred}}", "wrong"),
    ("18", r"\boxed{81 dollars}", "wrong"),
    ("5", r"\boxed{5x}", "wrong"),
    ("5", r"\boxed{5m}", "right"),
    ("5m", r"\boxed{5}", "wrong"),
    (r"50\%", r"\boxed{50}", "right"),
    ("50", r"\boxed{50\%}", "right"),
    ("50", r"\boxed{50 percent}", "right"),
    ("0.5", r"\boxed{50\%}", "right"),
    ("50", r"\boxed{5\%}", "wrong"),
    # complex and mixed numbers
    ("i", r"\boxed{1i}", "right"),
    ("-i", r"\boxed{-1i}", "right"),
    ("2i", r"\boxed{(1+i)^2}", "right"),
    ("3-2i", r"\boxed{3-2i}", "right"),
    ("3-2i", r"\boxed{3+2i}", "wrong"),
    (r"\frac54", r"\boxed{1\frac{1}{4}}", "right"),
    (r"\frac54", r"\boxed{1 \frac14}", "right"),
    (r"\frac54", r"\boxed{1 3/4}", "wrong"),
    ("-\\frac54", r"\boxed{-1 1/4}", "right"),
    # labels, other boxes
    ("5", r"\boxed{Answer: 5}", "right"),
    ("5", r"\boxed{\text{The answer is } 5}", "right"),
    ("5", r"\boxed{\textbf{5}}", "right"),
    ("5", r"\boxed{\mathbf{5}}", "right"),
    ("5", r"\boxed{\boxed{5}}", "right"),
    ("5", r"\fbox{5}", "right"),
    ("5", r"\boxed {5}", "right"),
    ("5", r"\boxed{5}. I put it into \boxed{...} as asked.", "right"),
    ("5", r"\boxed{} \boxed{ }", "unparsed"),
    ("6", r"\boxed{5}. (As asked, in \boxed{}.)", "wrong"),
    (r"\frac{5}{8}", r"\boxed{\frac{1}{1+\frac{1}{1+\frac{1}{1+\frac{1}{1+2}}}}}", "wrong"),
    (r"\{1,2\}", r"\boxed{\left\{1, 2\right\}}", "right"),
    (r"\{1\}", r"\boxed{1}", "right"),
    # inequalities and intervals
    ("(1,3)", r"\boxed{1<x<3}", "right"),
    ("[1,3]", r"\boxed{1<x<3}", "wrong"),
    ("[1,3)", r"\boxed{1 \leqslant x < 3}", "right"),
    ("[1,3]", r"\boxed{x \in [1,3]}", "right"),
    (r"(2,\infty)", r"\boxed{x>2}", "right"),
    (r"(2,\infty)", r"\boxed{2<x}", "right"),
    (r"(2,\infty)", r"\boxed{x\ge2}", "wrong"),
    ("x>2", r"\boxed{(2,\infty)}", "right"),
    ("x>2", r"\boxed{2}", "wrong"),
    ("x>2", r"\boxed{x<2}", "wrong"),
    (r"(-\infty,1)\cup(3,\infty)", r"\boxed{x<1 \text{ or } x>3}", "right"),
    (r"(-\infty,1)\cup(3,\infty)", r"\boxed{x<1 \text{ or } x \ge 3}", "wrong"),
    (r"(-\infty,1)\cup(3,\infty)", r"\boxed{x<1}", "wrong"),
    ("(1,3)", r"\boxed{x>1 \text{ and } x<3}", "right"),
    (r"1 \le x \le 3", r"\boxed{[1,3]}", "right"),
]

# As GSM8K's labelled solutions and models write them: nothing changes here
SIMPLE = [
    ("18", "#### 18", "right"),
    ("18", "She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "right"),
    ("18", "The answer is 18.", "right"),
    ("18", "The answer is $18.", "right"),
    ("18", "The answer is $18$.", "right"),
    ("18", "**18**", "right"),
    ("18", "The answer is **18**.", "right"),
    ("18", "So she makes **$18** every day.", "right"),
    ("18", "18 dollars", "right"),
    ("18", "18", "right"),
    ("18", "18.", "right"),
    ("18", "18.0", "right"),
    ("18", "\\boxed{18}", "right"),
    ("18", "\\boxed{18.00}", "right"),
    ("18", "$\\boxed{18}$", "right"),
    ("18", "\\[\\boxed{18}\\]", "right"),
    ("18", "\\(\\boxed{18}\\)", "right"),
    ("18", "$$\\boxed{18}$$", "right"),
    ("18", "Final answer: 18", "right"),
    ("18", "Answer: $18 per day", "right"),
    ("18", "She earns 9 * 2 = 18 dollars.", "right"),
    ("1,800", "The total is $1,800.", "right"),
    ("1800", "The total is $1,800.", "right"),
    ("1800", "#### 1,800", "right"),
    ("1,800", "\\boxed{1,800}", "right"),
    ("1800", "\\boxed{\\$1,800}", "right"),
    ("-3", "It is -3.", "right"),
    ("0.5", "The answer is 1/2.", "right"),
    ("1/2", "\\boxed{1/2}", "right"),
    ("2.5", "\\boxed{2.50}", "right"),
    ("25", "The answer is 25%.", "right"),
    ("70000", "profit of $70,000\n#### 70000", "right"),
    ("18", "#### 17", "wrong"),
    ("18", "The answer is 19.", "wrong"),
    ("18", "**81**", "wrong"),
    ("18", "\\boxed{1.8}", "wrong"),
    ("1800", "The total is $1,801.", "wrong"),
    ("18", "I do not know.", "unparsed"),
    ("18", "", "unparsed"),
    ("18", "<think>\\boxed{18}", "unparsed"),
    ("18", "<think>\\boxed{17}</think> \\boxed{18}", "right"),
    ("5", "Half of 10 is 10/2=<<10/2=5>>5\nSo 5 are left.\n#### 5", "right"),
]


@pytest.mark.parametrize("gold, text, grade", SEVERAL)
def test_several_answers(gold, text, grade):
    assert grade_math(gold, text) == grade


@pytest.mark.parametrize("gold, text, grade", WHOLE)
def test_a_right_answer_is_read_whole(gold, text, grade):
    assert grade_math(gold, text) == grade


@pytest.mark.parametrize("gold, text, grade", SMALL)
def test_small_numbers(gold, text, grade):
    assert grade_math(gold, text) == grade


@pytest.mark.parametrize("gold, text, grade", DRESS)
def test_other_dress(gold, text, grade):
    assert grade_math(gold, text) == grade


@pytest.mark.parametrize("depth", [1, 6, 20, 45])
def test_fractions_within_fractions(depth):
    text, value = "1", Fraction(1)
    for _ in range(depth):
        text, value = f"1+\\frac{{1}}{{{text}}}", 1 + 1 / value
    gold = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    assert grade_math(gold, f"\\boxed{{3}}. No: $\\boxed{{{text}}}$") == "right"
    assert grade_math(gold, f"\\boxed{{{text}+1}}") == "wrong"


@pytest.mark.parametrize("gold, text, grade", SIMPLE)
def test_plain_numbers(gold, text, grade):
    assert grade_math(gold, text) == grade


# Right answers in the style of OlympiadBench, MATH-500, Minerva, AIME and GSM8K, each with pieces of it: a member, a
# side, a term dropped, another index
GOLDS = {
    # numbers
    "42": ["4", "2"],
    "-7": ["7"],
    "204": ["20", "24"],
    "1,800": ["1", "800", "1,8"],
    "0.25": ["0", "25"],
    "\\frac{3}{4}": ["3", "4"],
    "-\\frac{3}{4}": ["\\frac{3}{4}", "-3"],
    "\\frac{\\sqrt{3}}{2}": ["\\sqrt{3}", "2", "3"],
    "2\\sqrt{3}": ["2", "\\sqrt{3}"],
    "1+\\sqrt{2}": ["1", "\\sqrt{2}"],
    "2^{2023}": ["2", "2023"],
    "10!": ["10"],
    "\\binom{10}{3}": ["10", "3"],
    "\\log_2 3": ["3", "2", "\\log 3"],
    "\\ln 2": ["2"],
    "3\\pi": ["3", "\\pi"],
    "e^2": ["e", "2"],
    "6.02e23": ["6.02", "23", "6.02e22"],
    "9.109 \\times 10^{-31}": ["9.109", "10^{-31}", "9.109 \\times 10^{-30}"],
    "1.6e-19": ["1.6", "1.6e-18", "0"],
    "3+4i": ["3", "4i", "4"],
    "1\\frac{1}{2}": ["1", "\\frac{1}{2}"],
    "50\\%": ["5"],
    "90^\\circ": ["9"],
    "\\$18.90": ["18", "0.90"],
    "5\\text{ cm}": ["5\\text{ m}", "\\text{cm}"],
    "120_8": ["120", "8", "120_9"],
    # several values
    "1,-2": ["1", "-2"],
    "69,84": ["69", "84"],
    "-6,-2,4,12": ["-6,-2,4", "4", "12"],
    "$1$ and $-2$": ["1", "-2"],
    "\\pm 2": ["2", "-2"],
    "1 \\pm \\sqrt{2}": ["1", "1+\\sqrt{2}"],
    "\\frac{1}{2},-3": ["\\frac{1}{2}", "-3", "1,2,-3"],
    "\\{1,2,3\\}": ["1", "\\{1,2\\}"],
    "(1,2),(3,4)": ["(1,2)", "(3,4)"],
    "k=3,-2": ["3", "-2", "k=3"],
    "x=1, y=2": ["1", "2", "x=1"],
    "2^{k}, k \\geq 1": ["2^{k}", "k \\geq 1"],
    "\\frac{1}{3}, \\frac{2}{3}, 1": ["1", "\\frac{1}{3}, \\frac{2}{3}"],
    "f(x)=0, f(x)=x^2": ["f(x)=0", "0", "x^2"],
    # tuples, intervals, sets, matrices
    "(1,2)": ["1", "2", "(2,1)"],
    "(1,1006),(3,331),(11,31)": ["(1,1006)", "(3,331)"],
    "(-\\infty,-1],[1,\\infty)": ["(-\\infty,-1]", "[1,\\infty)"],
    "m_{\\max }=n^{2}-n-1": ["m_{\\max}", "n^2", "n^{2}-n"],
    "$\\angle B E A_{1}=90$,$\\angle A E B_{1}=60$": ["90", "60", "90,90"],
    "352146,362145,452136": ["352146", "352146,362145"],
    "(1,8,19)": ["1", "(1,8)", "(19,8,1)"],
    "\\left(\\frac{3}{5}, \\frac{4}{5}\\right)": ["\\frac{3}{5}", "\\frac{4}{5}"],
    "(x,y)=(1,2)": ["1", "2", "(x,y)"],
    "[1,3]": ["1", "3", "(1,3)", "[1,3)"],
    "(2,\\infty)": ["2", "\\infty", "[2,\\infty)"],
    "(-\\infty, 0) \\cup\\{1\\}$.": ["(-\\infty,0)", "1", "0", "\\{1\\}"],
    "(-\\infty,1)\\cup(3,\\infty)": ["(-\\infty,1)", "(3,\\infty)"],
    "\\mathbb{R} \\setminus \\{0\\}": ["0", "\\mathbb{R}"],
    "\\begin{pmatrix}1\\\\2\\end{pmatrix}": ["1", "2", "\\begin{pmatrix}2\\\\1\\end{pmatrix}"],
    # expressions, equations, conditions
    "x^2-1": ["x^2", "x", "-1", "x^2-2"],
    "\\frac{n(n+1)}{2}": ["n(n+1)", "2", "\\frac{n(n-1)}{2}"],
    "x^2+y^2=1": ["1", "x^2", "x^2+y^2"],
    "y=2x+3": ["y", "2x", "3"],
    "x>2": ["2", "x", "x\\geq 2"],
    "1 \\le x \\le 3": ["1", "3", "x \\le 3", "1 \\le x"],
    "a_{n}=2^{n}": ["2", "n", "a_{n}"],
    "f(x)=\\frac{1}{x}": ["f(x)", "x", "1"],
    "\\gamma^2-1": ["-1", "\\gamma^2", "1"],
    "m_{p} c^{2}\\left(\\gamma^{2}-1\\right)": ["m_{p} c^{2}", "\\gamma^{2}-1", "m_{p} c^{2}(\\gamma-1)"],
    "E_1": ["1", "E", "E_2"],
    "\\frac{E_1+E_2}{2}": ["E_1+E_2", "E_1", "2"],
    "I(0) e^{-t/RC}": ["I(0)", "e^{-t/RC}", "0"],
    "\\frac{R-r}{R+r}": ["R-r", "R+r", "0"],
    "\\frac{1}{2} m v^{2}": ["m v^{2}", "\\frac{1}{2}", "v^2"],
    "\\sqrt{\\frac{2 g h}{1+\\beta}}": ["\\frac{2 g h}{1+\\beta}", "2gh", "\\sqrt{2gh}"],
    "\\frac{d y}{d x}=3x": ["3x", "3", "x"],
    "y''+y=0": ["y+y=0", "0", "y''"],
    "3t": ["3", "t"],
    "3x-2t": ["3x-2", "3x", "2t"],
    "A \\sin(\\omega t+\\phi)": ["A", "\\sin(\\omega t)", "A\\sin(\\omega t)"],
    "\\arctan\\left(\\frac{1}{2}\\right)": ["\\frac{1}{2}", "\\arctan 2"],
    "n \\equiv 1 \\pmod{3}": ["1", "3", "n"],
    "1+2+\\ldots+n": ["1+2+n", "n", "1+2"],
    "\\{x \\mid x>2\\}": ["2", "x"],
    "\\sum_{k=1}^{n} k^2": ["k^2", "n", "\\sum_{k=1}^{n} k"],
    "2023^{2024}-1": ["2023^{2024}", "1", "-1"],
    # words
    "east": ["teas", "eas", "e"],
    "\\text{even}": ["\\text{e}", "\\text{eve}"],
    "yes": ["y", "es"],
    "Alice and Bob": ["Alice", "Bob"],
    "all odd primes": ["all primes", "odd"],
    "The function is even": ["even", "The function"],
    "\\text{MULTINOMIAL}": ["M", "NOMIAL"],
}  # fmt: skip


@pytest.mark.parametrize("gold", GOLDS)
def test_a_right_answer_accepts_itself_and_no_piece(gold):
    bare = gold.removesuffix("$.").strip("$")
    for text in (f"\\boxed{{{gold}}}", f"So it is $\\boxed{{{bare}}}$.", f"$$\\boxed{{{bare}.}}$$"):
        assert grade_math(gold, text) == "right", text
    for piece in GOLDS[gold]:
        assert grade_math(gold, f"\\boxed{{{piece}}}") == "wrong", piece
    rows.check({"question": "q", "answer": gold}, "math", "line 1")


@pytest.mark.parametrize("gold", ["}", "{", "\\frac{1}{2", "", "$", ".", "?", "\\boxed{}"])
def test_a_right_answer_that_cannot_be_read_is_named(gold):
    with pytest.raises(ValueError, match="line 3"):
        rows.check({"question": "q", "answer": gold}, "math", "line 3")


@pytest.mark.parametrize("name", ["grading_math.jsonl", "grading_math_second.jsonl"])
def test_further_answers(name):
    """Right and wrong answers of all four kinds, of which the wrong ones are near to the right.

    The second file has what a review found, with neighbours: numbers of any size, values taken back, denials, bounds,
    coordinates with names, pieces of equations, units, words around amounts.
    """
    cases = [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]
    assert len(cases) > 300
    assert [case for case in cases if grade_math(case["gold"], case["answer"]) != case["want"]] == []


# -- properties ------------------------------------------------------------------------------------------------------

BOXED = {  # ways of writing several values
    "a box each": lambda values: ", ".join(f"\\boxed{{{value}}}" for value in values),
    "a box each, and": lambda values: " and ".join(f"$\\boxed{{{value}}}$" for value in values),
    "a sentence each": lambda values: " ".join(f"One value is \\boxed{{{value}}}." for value in values),
    "a line each": lambda values: "\n".join(f"- $\\boxed{{{value}}}$" for value in values),
    "one box": lambda values: f"\\boxed{{{','.join(values)}}}",
    "one box, or": lambda values: "\\boxed{" + " \\text{ or } ".join(f"x={value}" for value in values) + "}",
    "a set": lambda values: f"$$\\boxed{{\\left\\{{{', '.join(values)}\\right\\}}}}$$",
    "on the way": lambda values: (
        "".join(f"We get \\boxed{{{v}}}. " for v in values) + f"\\boxed{{{', '.join(values)}}}"
    ),
}
VALUES = st.lists(
    st.sampled_from(["0", "-1", "2", "17", "\\frac{1}{2}", "-\\frac{3}{4}", "\\sqrt{2}", "2\\pi", "x+1", "(1,2)", "i"]),
    min_size=2,
    max_size=5,
    unique=True,
)


@settings(max_examples=60, deadline=None)
@given(VALUES, st.randoms(use_true_random=False), st.sampled_from(sorted(BOXED)))
def test_the_order_and_the_form_of_several_values_do_not_matter(values, random, form):
    gold = ", ".join(values)
    random.shuffle(values)
    assert grade_math(gold, BOXED[form](values)) == "right"
    assert grade_math(gold, BOXED[form](values[1:])) == "wrong"
    assert grade_math(gold, BOXED[form]([*values[1:], "23"])) == "wrong"
    assert grade_math(gold, BOXED[form]([*values, "23"])) == "wrong"


@settings(max_examples=60, deadline=None)
@given(st.integers(100, 999), st.integers(100, 999), st.integers(8, 60))
def test_small_numbers_are_equal_where_all_digits_are(one, other, exponent):
    said = f"\\boxed{{{other} \\times 10^{{-{exponent}}}}}"
    assert grade_math(f"{one / 100}e-{exponent - 2}", said) == ("right" if one == other else "wrong")


@given(
    st.recursive(
        st.sampled_from(["", "5", "x", "\\{", "\\}", "\\\\"]),
        lambda inner: st.tuples(inner, inner).map("{%s}%s".__mod__),
    )
)
def test_a_box_holds_braces_to_any_depth(content):
    found = boxes(f"so \\boxed{{{content}5}}, {{not}} \\boxed{{")
    assert [box.content for box in found] == [content + "5"]


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("\\{}()[],.$^_%=<>|& 0123456789abixyE-+/*\n°−"), max_size=30))
def test_no_answer_makes_the_grader_fail(content):
    for text in (content, f"\\boxed{{{content}}}", f"The answer is {content}"):
        assert judge_math("5", text).grade in ("right", "wrong", "unparsed")


# -- what a verdict says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gold, text, grade, extracted, reason",
    [
        ("1,-2", r"$x=\boxed{1}$ or $x=\boxed{-2}$", "right", "1, -2", None),
        ("4,9", r"First $\boxed{4}$. Then $\boxed{9}$.", "right", "4, 9", None),
        ("5", r"\boxed{3}. No: \boxed{4 \text{ cm}}", "wrong", r"4 \text{ cm}", None),
        ("east", r"\boxed{\text{west}}", "wrong", r"\text{west}", "compared as text"),
        ("east", "The answer is west.", "wrong", "west", "compared as text"),
        ("18", "She has 17.", "wrong", "17", None),
        ("18", "I do not know.", "unparsed", None, None),
        ("5", "\\boxed{9^{9^{9^9}}}", "wrong", "9^{9^{9^9}}", "the comparison took more than 5 s"),
        ("5", "\\boxed{((((9!)!)!)!)!}", "wrong", "((((9!)!)!)!)!", "the comparison took more than 5 s"),
    ],
)
def test_a_verdict_says_what_was_found_and_why(gold, text, grade, extracted, reason):
    assert judge_math(gold, text) == Verdict(grade, extracted, reason)


def test_the_time_limit_holds_where_a_list_is_read_too():
    """In a process of its own, which has read nothing before: reading the list once switched the limit off."""
    code = (
        "from tah.evaluation.answers import judge_math\n"
        "print(judge_math('1,234', r'\\boxed{9^{9^{9}}}, \\boxed{\\text{foo}}').reason)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "the comparison took more than 5 s"


def test_a_right_answer_that_took_too_long_is_read_again(monkeypatch):
    def too_long(seconds):
        def run():
            raise TimeoutException

        return lambda function: run

    with monkeypatch.context() as patch:
        patch.setattr(answers, "timeout", too_long)
        assert not read_math("7!+1").mathematics
    assert read_math("7!+1").mathematics


def test_another_thread_is_refused_in_words():
    for grade in (lambda: read_math("5"), lambda: judge_math("5", "5")):
        with ThreadPoolExecutor() as pool, pytest.raises(RuntimeError, match="in the main thread only"):
            pool.submit(grade).result()


@pytest.mark.parametrize(
    "text, grade",
    [
        ("\\boxed{" * 14_000, "unparsed"),
        ("\\boxed{" * 7_000 + "5" + "}" * 7_000, "wrong"),  # longer than mathematics is
        ("\\boxed{" + "{" * 20_000 + "6" + "}" * 20_000 + "}", "wrong"),
        ("\\boxed{5} " * 10_000 + "\\boxed{6}", "wrong"),
        ("\\boxed{5}\n" * 3_000, "right"),  # a model that repeats itself
        ("".join(f"\\boxed{{{at}}}, " for at in range(3_000)) + "\\boxed{5}", "wrong"),
        ("word " * 20_000 + "\\boxed{5}", "right"),
        ("\\boxed{5" + " " * 90_000 + "}", "right"),
        ("\\boxed{5" + " " * 90_000 + "x}", "wrong"),
        ("\\boxed{5 " + "a" * 1_900 + "}", "wrong"),
        ("\\boxed{" + "1" * 100_000 + "}", "wrong"),
        ("\\boxed{5}" + "," * 90_000 + "\\boxed{6}", "wrong"),
        ("1" * 100_000, "unparsed"),
        ("\\boxed{5}" + " only" * 20_000, "right"),
        ("\\boxed{5} wait" + " the answer is" * 10_000, "right"),
        ("The answer is " + "6 " * 50_000, "wrong"),
        ("\\boxed{" + "ab" * 900 + "!=5}", "wrong"),
        ("\\boxed{" + "\\begin{cases}" * 140 + "}", "wrong"),
        ("\\boxed{" + "1" * 1_900 + ".\\overline{3}}", "wrong"),
    ],
    ids=range(19),
)
def test_long_answers(text, grade):
    assert grade_math("5", text) == grade


# -- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "final, answer, values",
    [
        (["$2$"], "2", 1),
        (["1,-2"], "1,-2", 2),
        (["100,200"], "100,200", 1),  # or a list: see `test_several_answers`
        (["$1$", "$-2$"], "1, -2", 2),
        (["$1,000$", "$2,500$"], "1,000, 2,500", 2),
        (["$(1,200),(3,4)$"], "(1,200),(3,4)", 2),
    ],
)
def test_answers_of_olympiadbench(final, answer, values):
    row = rows.olympiadbench({"question": "q", "final_answer": final})
    assert row["answer"] == answer and len(read_math(answer).values) == values


def test_dollars_within_a_right_answer_are_kept(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "q", "answer": "$1$ and $-2$"}\n', "utf-8")
    loaded = rows.load(name="q", kind="math", hub="", split="", read=rows.plain, data={"q": str(path)})
    assert loaded["test"][0]["answer"] == "$1$ and $-2$"
    assert grade_math("$1$ and $-2$", r"\boxed{-2}, \boxed{1}") == "right"
