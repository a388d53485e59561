"""The bank's text (markdown with LaTeX in $..$) for a terminal and for a page.

    to_html(text)   HTML with math in \\(..\\) and \\[..\\]: what Anki and JupyterLab's MathJax both read
    to_plain(text)  a terminal's text: the commonest LaTeX as Unicode, the rest left as it was written

markdown-it-py parses; raw HTML in the text is shown, never obeyed.
"""

import functools
import html
import re

from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

_SIGNS = {
    "times": "×", "cdot": "·", "approx": "≈", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠",
    "pm": "±", "to": "→", "rightarrow": "→", "infty": "∞", "sum": "Σ", "prod": "Π", "in": "∈", "partial": "∂",
    "nabla": "∇", "sigma": "σ", "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "Delta": "Δ", "epsilon": "ε",
    "eta": "η", "theta": "θ", "lambda": "λ", "mu": "µ", "pi": "π", "rho": "ρ", "tau": "τ", "phi": "φ", "omega": "ω",
    "odot": "⊙", "ldots": "…", "dots": "…", "cdots": "…", "quad": "  ",
    "mid": "|", "lVert": "‖", "rVert": "‖", "|": "‖", "lceil": "⌈", "rceil": "⌉", "lfloor": "⌊",
    "rfloor": "⌋", "top": "ᵀ", "div": "÷", "propto": "∝", "sim": "~", "ll": "≪", "gg": "≫", "ell": "ℓ", "langle": "⟨",
    "rangle": "⟩", "Sigma": "Σ", "Theta": "Θ", "Omega": "Ω", "psi": "ψ", "kappa": "κ", "nu": "ν", "chi": "χ",
}  # fmt: skip
_WRAPPERS = r"\\(?:text|mathrm|mathbf|mathit|mathcal|mathbb|operatorname|textbf|texttt|boldsymbol|hat|bar|tilde)"


def to_html(text: str) -> str:
    """HTML of a text of the bank."""
    return _parser().render(text).strip()


@functools.cache
def _parser() -> MarkdownIt:
    def math(content: str, options: dict) -> str:
        left, right = (r"\[", r"\]") if options["display_mode"] else (r"\(", r"\)")
        return f"{left}{html.escape(content.strip(), quote=False)}{right}"

    parser = MarkdownIt("commonmark", {"html": False}).enable(["table"])
    return parser.use(dollarmath_plugin, renderer=math, allow_labels=False, allow_space=False, allow_digits=False)


def to_plain(text: str) -> str:
    """A text of the bank for a terminal. Code keeps every character."""
    parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.DOTALL)
    plain = "".join(part if i % 2 else _plain(part) for i, part in enumerate(parts))
    return re.sub(r"(?m)^```\w*\n?", "", plain).strip()


def _plain(text: str) -> str:
    text = re.sub(r"(?<!\\)\$\$(.+?)\$\$", lambda m: _formula(m[1]), text, flags=re.DOTALL)
    text = re.sub(r"(?<![\\\w$])\$(?!\s)([^$]+?)(?<![\s\\])\$(?![\d$])", lambda m: _formula(m[1]), text)
    text = re.sub(r"\*\*(.+?)\*\*", r"\1", text, flags=re.DOTALL)
    text = re.sub(r"\[([^\[\]]+)\]\((https://[^()\s]+)\)", r"\1 <\2>", text)
    return text.replace(r"\$", "$")


def _formula(text: str) -> str:
    text = re.sub(r"\\(?:left|right|big|Big|bigl|bigr|Bigl|Bigr)\b\s*", "", text)
    for _ in range(3):  # wrappers inside fractions inside fractions
        text = re.sub(_WRAPPERS + r"\s*\{([^{}]*)\}", r"\1", text)
        text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", lambda m: f"{_group(m[1])}/{_group(m[2])}", text)
        text = re.sub(r"\\sqrt\s*\{([^{}]*)\}", r"√(\1)", text)
    text = re.sub(r"\\([A-Za-z]+|\|)(?=(.?))", _sign, text, flags=re.DOTALL)
    text = re.sub(r"([_^])\{([^{}])\}", r"\1\2", text)
    text = re.sub(r"([_^])\{([^{}]*)\}", r"\1(\2)", text)
    return re.sub(r"\\([,;:! %&#_{}])", lambda m: m[1] if m[1] in "%&#_{}" else " ", text).replace(r"\\", "\n").strip()


def _sign(match: re.Match) -> str:
    """A command as a sign; as its own name (`sin`, `softmax`), set off from a letter behind it, when there is none."""
    name, behind = match[1], match[2]
    return _SIGNS.get(name) or name + (" " if behind.isalnum() or behind == "\\" else "")


def _group(text: str) -> str:
    return text if re.fullmatch(r"\\?[\w.,]+", text.strip()) else f"({text})"
