"""State files built byte by byte, independently of gguf_io's writer, so that they can lie."""

import struct


def u32(*values):
    return struct.pack(f"<{len(values)}I", *values)


def cells(count, mrope=False, sequences=(0,)):
    """Cell count and cells at positions 0, 1, ...; `sequences` may be a list of tuples."""
    per_cell = sequences if isinstance(sequences, list) else [sequences] * count
    data = u32(count)
    for i in range(count):
        data += struct.pack("<iI", i, len(per_cell[i]))
        data += struct.pack("<ii", 3, 4) if mrope else b""
        data += struct.pack(f"<{len(per_cell[i])}i", *per_cell[i])
    return data


def rows(type_id, row_bytes, count, fill=b"\0"):
    body = (fill * (row_bytes * count))[: row_bytes * count]
    return struct.pack("<iQ", type_id, row_bytes) + body


def kv(
    count=3,
    layers=((1, 512), (1, 512)),
    values=None,
    mrope=False,
    deferred=None,
    sequences=(0,),
    fill=b"\0",
):
    """A KV memory of one stream; `values` are (type, row bytes) like `layers`, () for none."""
    values = layers if values is None else values
    data = u32(1) + (b"" if deferred is None else bytes([deferred]))
    data += cells(count, mrope, sequences)
    if not count:
        return data
    data += u32(0, len(layers))
    return data + b"".join(rows(t, size, count, fill) for t, size in (*layers, *values))


def rec(count=1, n_layer=4, r=(64, 64), s=(128, 128), sequences=(0,)):
    """A recurrent memory of float32 rows."""
    data = cells(count, False, sequences) + u32(0, n_layer)
    return data + b"".join(rows(0, size, count) for size in (*r, *s))


def sequence(memory, tokens=(1, 2, 3), version=2, magic=0x67677371):
    return u32(magic, version, len(tokens)) + struct.pack(f"<{len(tokens)}i", *tokens) + memory


def session(memory, architecture=b"llama", tokens=(1, 2, 3), version=9):
    head = sequence(b"", tokens, version, 0x6767736E)
    return head + u32(len(architecture)) + architecture + memory
