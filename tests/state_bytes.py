"""State files built byte by byte, independently of gguf_io's writer, so that they can lie."""

import hashlib
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


# --- versions 10 and 3, and what other programs write ---------------------------------------------


def mrope_cells(count, record):
    """Cells with a record of coordinates: `record(i)` gives its int32 values."""
    data = u32(count)
    for i in range(count):
        values = record(i)
        data += struct.pack(f"<iI{len(values)}ii", i, 1, *values, 0)
    return data


def kv_of(cells_bytes, count, keys, values, rotation=None, streams=True):
    """A KV memory of one stream around cells that are given."""
    data = (u32(1) if streams else b"") + cells_bytes + u32(0, len(keys))
    data += b"" if rotation is None else u32(*rotation)
    return data + b"".join(rows(t, size, count, b"\1\2\3") for t, size in (*keys, *values))


def packed_tokens(tokens, media=()):
    """llama-server's packed list as int32 words; media are (start, bytes)."""
    data = struct.pack("<iII", -1, 1, len(tokens)) + struct.pack(f"<{len(tokens)}i", *tokens)
    data += u32(len(media)) + b"".join(u32(start) for start, _ in media)
    data += b"".join(u32(len(body)) + body for _, body in media)
    data += bytes(-len(data) % 4)
    return struct.unpack(f"<{len(data) // 4}i", data)


def tensor(type_id, values, n_rows, row_bytes, streams=1, fill=b"\3"):
    """A tensor as deepseek4's memory has them."""
    body = (fill * (n_rows * row_bytes * streams))[: n_rows * row_bytes * streams]
    return struct.pack("<iQQQ", type_id, values, n_rows, row_bytes) + body


def dsv4(count=3, rows_of=(2, 1, 2), mode=0, head=64, indexer=128, layers=2):
    """The memory of deepseek4: float16 keys, float32 states, layers 2 and 3 compressed."""
    data = u32(0x34565344, 1, mode)
    if count:
        data += kv_of(cells(count), count, (), ())
        data += kv_of(cells(count), count, ((1, 2 * head),) * layers, ())
    else:
        data += kv(0) * 2
    widths = (head, head, indexer)
    for n, width in zip(rows_of, widths, strict=True) if mode == 0 else ():
        data += u32(2, n, 1, 1) + u32(2) + tensor(1, width, n, 2 * width)
    for ratio, size, width in ((4, 8, 2 * head), (128, 128, head), (4, 8, 2 * indexer)):
        data += u32(1, ratio, size, width, 1, 1) + u32(2)
        data += tensor(0, width, size, 4 * width) * 2
    return data


def fnv1a64(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % (1 << 64)
    return value


def buun(memory, words=(1, 2, 3), version=3, checksum=None):
    """buun's sequence file with its header of 24 bytes."""
    body = u32(len(words)) + struct.pack(f"<{len(words)}i", *words) + memory
    checksum = fnv1a64(body) if checksum is None else checksum
    return u32(0x67677371, version) + struct.pack("<QQ", 24 + len(body), checksum) + body


def envelope(tokens=(5, 6, 7), logits=(), digests=None):
    """buun's BUUNSLOT around a packed list, as int32 words; digests by their place."""
    packed = struct.pack(f"<{len(p := packed_tokens(tokens))}i", *p)
    values = struct.pack(f"<{len(logits)}f", *logits)
    head = bytearray(224)
    head[:8] = b"BUUNSLOT"
    struct.pack_into("<IIII", head, 8, 2, 224, 1 if logits else 0, 0)
    struct.pack_into("<Q", head, 24, len(packed))
    struct.pack_into("<I", head, 48, len(logits))
    head[56:88] = bytes(range(32))
    head[152:184] = hashlib.sha256(packed).digest()
    head[184:216] = hashlib.sha256(values).digest() if logits else bytes(32)
    struct.pack_into("<Q", head, 216, len(values))
    for at, digest in (digests or {}).items():
        head[at : at + 32] = digest
    data = bytes(head) + packed + values
    return struct.unpack(f"<{len(data) // 4}i", data)


def ik_cells(count, sequences=()):
    data = u32(count)
    for i in range(count):
        data += struct.pack(f"<iI{len(sequences)}i", i, len(sequences), *sequences)
    return data


def ik_rows(spec, count, fill=b"\5"):
    """Rows of one layer, or what stands for a layer that is not there."""
    return struct.pack("<iQ", -1, 0) if spec is None else rows(*spec, count, fill)


def ik(
    count=3,
    keys=((1, 64), None, (1, 64)),
    values=((1, 64), None, (1, 64)),
    sequences=(),
    v_state=0,
    window=None,
    linear=None,
    indexer=None,
):
    """ik_llama.cpp's cache; `linear` has (type, row bytes, rows) or None per layer."""
    data = b"" if window is None else struct.pack("<IIIiI", 0x53574143, *window)
    data += ik_cells(count, sequences) + u32(v_state, len(keys))
    data += b"".join(ik_rows(spec, count) for spec in keys)
    if v_state == 0:
        data += b"".join(ik_rows(spec, count) for spec in values)
    elif v_state == 1:
        for spec in values:
            if spec is None:
                data += struct.pack("<iQ", -1, 0)
            else:
                n = spec[1] // 2
                data += struct.pack("<iII", spec[0], 2, n) + bytes(2 * n * count)
    data += u32(linear is not None)
    for spec in linear or ():
        type_id, size, n = spec or (-1, 0, 0)
        data += struct.pack("<iQI", type_id, size, n) + b"\7" * (size * n)
    data += u32(indexer is not None)
    return data + b"".join(rows(*spec, count) for spec in indexer or ())


def ik_session(cache, logits=(0.5, 1.5), embeddings=(), outputs=(0,), random=b"17 42 99"):
    """ik_llama.cpp's session file."""
    data = u32(len(random)) + random
    data += u32(len(outputs)) + struct.pack(f"<{len(outputs)}i", *outputs)
    for floats in (logits, embeddings):
        data += struct.pack(f"<Q{len(floats)}f", len(floats), *floats)
    return session(data + cache, version=10)


def checkpoints(*bodies):
    """The appendix of a patched llama-server: three states per checkpoint."""
    data = b"SCKP" + u32(1, len(bodies))
    for states in bodies:
        data += struct.pack("<qii", 252, 0, 251)
        data += b"".join(struct.pack("<Q", len(state)) + state for state in states)
    return data
