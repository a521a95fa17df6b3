"""What mkdocs does to every page of the site: roles of Sphinx are dropped, TeX becomes MathML.

Formulas are written as GitHub reads them, $`E = m c^2`$, in text and in tables. Browsers set MathML
without a script (Chromium since version 109, Firefox, Safari).
"""

from __future__ import annotations

import html as entities
import re

_ROLE = re.compile(r":(?:class|meth|func|mod|data|attr):(?=<)")
_FORMULA = re.compile(r"\$<code>(.*?)</code>\$", re.DOTALL)

_TRANSPOSED = re.compile(r"<mo>&#x022A4;</mo>")
"""As an operator it would have the room of one."""
_FUNCTION = re.compile(r"<m[io]>(?:log|det|diag|mean|std|tr)</m[io]>(?!<mo)")
"""A function whose argument has no parentheses, which needs room before it."""


def on_page_content(html: str, **_: object) -> str:
    """The HTML of a page; mkdocs calls this.

    Raises:
        ValueError: A formula cannot be set.
    """
    return _FORMULA.sub(_mathematics, _ROLE.sub("", html))


def _mathematics(found: re.Match[str]) -> str:
    from latex2mathml.converter import convert  # of the extra docs, without which tests run too

    tex = entities.unescape(found[1])
    try:
        mathematics = str(convert(tex))
    except Exception as error:  # latex2mathml has many kinds
        raise ValueError(f"the formula {tex} cannot be set: {error!r}") from error
    if "\\" in mathematics:
        raise ValueError(f"the formula {tex} has a command that is not known")
    mathematics = _TRANSPOSED.sub("<mi>&#x022A4;</mi>", mathematics)
    return _FUNCTION.sub(r'\g<0><mspace width="0.17em"/>', mathematics)
