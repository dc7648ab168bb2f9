"""Laws of state files over random structures: what is built is read, what is read is written."""

import state_bytes as sb
from hypothesis import given
from hypothesis import strategies as st

from gguf_io import open_state, write_state

TYPES = [(0, 1024), (1, 512), (8, 272), (42, 98), (42, 112), (43, 130), (50, 72), (60, 7)]
ROWS = st.sampled_from(TYPES)
SEQUENCES = st.lists(st.integers(0, 255), min_size=1, max_size=3).map(tuple)


@st.composite
def kv_memories(draw, deferred, mrope, has_values):
    count = draw(st.integers(1, 5))
    layers = draw(st.lists(ROWS, min_size=1, max_size=4))
    values = draw(st.lists(ROWS, min_size=len(layers), max_size=len(layers))) if has_values else ()
    return sb.kv(
        count,
        layers,
        values,
        mrope,
        draw(st.integers(0, 3)) if deferred else None,
        draw(st.lists(SEQUENCES, min_size=count, max_size=count)),
        draw(st.binary(min_size=1, max_size=40)),
    )


@st.composite
def dumps(draw):
    """A file and the arguments that leave only one reading of it."""
    memory = draw(st.sampled_from(["kv", "iswa", "hybrid", "hybrid_iswa", "recurrent"]))
    flags = {
        "deferred": draw(st.booleans()),
        "mrope": draw(st.booleans()),
        "has_values": draw(st.booleans()),
    }
    parts = {"kv": 1, "hybrid": 1, "recurrent": 0}.get(memory, 2)
    data = b"".join(draw(kv_memories(**flags)) for _ in range(parts))
    wanted = {"memory": memory}
    if parts:
        wanted |= {"mrope": flags["mrope"], "values": flags["has_values"]}
    if memory not in ("kv", "iswa"):
        sizes = draw(st.lists(st.integers(0, 9).map(lambda n: 4 * n), min_size=1, max_size=4))
        layers = draw(st.integers(len(sizes), 9))
        data += sb.rec(draw(st.integers(0, 3)), layers, sizes, [4] * len(sizes))
        wanted["recurrent_layers"] = len(sizes)
    tokens = draw(st.lists(st.integers(-1, 1 << 20), max_size=5))
    wrap = sb.session if draw(st.booleans()) else sb.sequence
    return wrap(data, tokens=tokens), wanted, flags["deferred"] and parts > 0


@given(dumps())
def test_what_is_built_is_read_and_written(tmp_path_factory, dump):
    data, wanted, deferred = dump
    folder = tmp_path_factory.mktemp("state")
    path, out = folder / "in.bin", folder / "out.bin"
    path.write_bytes(data)
    with open_state(path, **wanted) as s:
        assert s.layout.deferred == deferred
        for name, value in wanted.items():
            assert getattr(s.layout, name) == value
        for t in s.tensors.values():
            assert t.rows().nbytes == t.n_bytes
        write_state(out, s)
    assert out.read_bytes() == data
