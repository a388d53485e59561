"""Sliders on a picture or a table, alive in JupyterLab and a still on a page without a kernel.

    def plot(rank): ...; return figure, f"rank {rank}: {n:,} parameters"        # pure: test it like any function
    Explorer(plot, alt="Parameters against rank, a straight line.", rank=IntSlider(8, 1, 64))

`plot(**values)` returns `(figure, text)`, or `(html, text)` for a table. The Explorer is a `VBox`; its MIME bundle
also carries the first picture (with `alt`) or table and the text, so one output serves everywhere.
No `Output` widget (it swallows errors and has hung nbclient) and no redraw while a slider is dragged.
"""

import html
from collections.abc import Callable

import ipywidgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from finetune_lab.course import plots
from finetune_lab.errors import UserError

# JupyterLab breaks lines of a <pre> inside words
STATUS = '<pre role="status" aria-live="polite" style="white-space: pre-wrap; word-break: normal">{}</pre>'


class Explorer(ipywidgets.VBox):
    """Wire `plot` to `controls` (name=widget, the names of plot's parameters). `alt` describes the picture or table."""

    def __init__(self, plot: Callable[..., tuple[Figure | str, str]], alt: str, **controls: ipywidgets.Widget):
        if not alt.strip():
            raise UserError("an Explorer needs alt: a sentence that says what the picture or table shows.")
        self._plot, self._alt, self._controls = plot, alt, controls
        self._view, self._status = ipywidgets.HTML(), ipywidgets.HTML()
        for name, control in controls.items():
            if control.has_trait("continuous_update"):
                control.continuous_update = False
            if not control.description:
                control.description = name
            control.observe(self._changed, names="value")
        self._still = self._draw()
        super().__init__([*controls.values(), self._view, self._status])

    def _draw(self) -> tuple[dict, dict]:
        """Show the current values; return (data, metadata) of the same as a still."""
        shown, text = self._plot(**{name: control.value for name, control in self._controls.items()})
        if isinstance(shown, Figure):
            data, metadata = plots.bundle(shown, f"{self._alt} {text}")
            plt.close(shown)
            shown = self._view.value = data["text/html"]
        else:
            data, metadata = {}, {}
            label = html.escape(self._alt, quote=True)
            self._view.value = f'<div role="group" aria-label="{label}">{shown}</div>'
        data["text/html"] = f"{shown}<pre>{html.escape(text)}</pre>"
        data["text/plain"] = f"{self._alt}\n{text}"
        self._status.value = STATUS.format(html.escape(text))
        return data, metadata

    def _changed(self, _change: dict) -> None:
        try:
            self._draw()
        except Exception as error:
            self._status.value = STATUS.format(html.escape(f"{type(error).__name__}: {error}"))
            raise  # nbval and the log must see it too

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        data, metadata = self._still
        return {**super()._repr_mimebundle_(**kwargs), **data}, metadata
