"""Sliders on a picture or a table, alive in JupyterLab and a still on a page without a kernel.

    def plot(rank): ...; return figure, f"rank {rank}: {n:,} parameters"        # pure: test it like any function
    Explorer(plot, alt="Parameters against rank, a straight line.", rank=IntSlider(8, 1, 64))

`plot(**values)` returns `(figure, text)`, or `(html, text)` for a table. The Explorer is a `VBox`; its MIME bundle
also carries the first picture (with `alt`) or table and the text, so one output serves everywhere.
No `Output` widget (it swallows errors and has hung nbclient) and no redraw while a slider is dragged.
The keyboard is enough: Tab goes from control to control. JupyterLab 4.6 takes the arrow keys of a menu for itself (they
select the next cell), so a `Dropdown` is shown as a row of buttons, or as a slider when it has many options.
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
FEW = 6  # options of a menu that are shown as buttons


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
        super().__init__([*map(_for_keys, controls.values()), self._view, self._status])

    def _draw(self) -> tuple[dict, dict]:
        """Show the current values; return (data, metadata) of the same as a still."""
        shown, text = self._plot(**{name: control.value for name, control in self._controls.items()})
        if isinstance(shown, Figure):
            data, metadata = plots.bundle(shown, f"{self._alt} {text}")
            plt.close(shown)
            shown = data["text/html"]
            self._view.value = shown.replace("<img ", '<img style="max-width: 100%" ', 1)  # a narrow window
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


def _for_keys(control: ipywidgets.Widget) -> ipywidgets.Widget:
    """The control itself, or for a menu a twin that keeps its arrow keys; both have the same value at all times."""
    if not isinstance(control, ipywidgets.Dropdown):
        return control
    shared = {name: getattr(control, name) for name in ("options", "value", "description")}
    style, width = {"description_width": control.style.description_width}, control.layout.width
    if len(control.options) <= FEW:
        twin = ipywidgets.ToggleButtons(**shared, style=style | {"button_width": "auto"}, layout={"width": width})
        twin.add_class("widget-inline-hbox")  # the label stands at the left, as everywhere
    else:
        twin = ipywidgets.SelectionSlider(
            **shared, style=style, layout={"width": width or "500px"}, continuous_update=False
        )
    ipywidgets.link((control, "value"), (twin, "value"))
    return twin
