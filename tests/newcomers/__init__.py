"""Four formats that nobody has, of the kinds that a registry of formats gets wrong.

They stand for every family that will ever be added: each is a family file, a kernel file, a port,
and one row of a dialect here. `test_newcomers.py` drives them through every program and every law;
nothing outside this folder knows them.
"""

from newcomers.families.fakes import ByHead, OddNames, Quad, TwoScales
from tbq.dialect import Dialect, GraphRotation, Release
from tbq.format import Format


def _format(name: str, codec, side: str, **fields) -> Format:
    source = "newcomers @ 000000000: nowhere"
    notes = "A fake; its vectors are its own specification."
    return Format("newcomers", name, codec, side, source, notes=notes, **fields)


QUAD = _format("quad", Quad(), "KV")
TWO = _format("two", TwoScales(), "KV")
ODD = _format("odd", OddNames(), "K")
HEAD = _format("head", ByHead(1.0), "KV", by_head_dim={64: ByHead(0.5)})

DIALECT = Dialect(
    name="newcomers",
    title="formats that nobody has",
    rotation=GraphRotation(),
    releases=(
        Release("2099", types={97: QUAD, 98: TWO, 99: ODD, 41: HEAD}, upstream=40),
        Release("2098", types={96: QUAD}, upstream=40),
    ),
    functions=None,
)
