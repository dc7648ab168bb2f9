"""tbq-eval's plot: divergence over bits per value."""

from __future__ import annotations

import io

from gguf_io import AtomicFiles
from tbq import BackendError
from tbq.extras import install_command

LEAST_KLD = 1e-5  # where the logarithmic axis begins


def require_matplotlib() -> None:
    """Raise BackendError, which says what to install, if there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        need = f"--plot needs it: {install_command('html')}"
        raise BackendError("matplotlib", need) from None


def write_plot(path: str, report: dict) -> None:
    """Write the plot as PNG, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    results = [r for r in report["results"] if r["kld"] > LEAST_KLD]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    front = [r for r in results if r["front"]]
    axes.plot([r["bpw"] for r in front], [r["kld"] for r in front], color="#2563eb", lw=1)
    for r in results:
        color = "#2563eb" if r["front"] else "#777777"
        axes.errorbar(r["bpw"], r["kld"], r["kld_se"], fmt="o", ms=5, color=color)
        name = f"{r['k']}/{r['v']}"
        axes.annotate(name, (r["bpw"], r["kld"]), (5, 4), textcoords="offset points", fontsize=8)
    if results:
        axes.set_yscale("log")
    axes.set_xlabel("bits per value of K and V")
    axes.set_ylabel(f"divergence from {report['base']}, nats per token")
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    with AtomicFiles() as files:
        files.create(path).write(data.getbuffer())
