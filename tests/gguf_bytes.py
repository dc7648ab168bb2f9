"""GGUF files built byte by byte, independently of gguf_io.writer, so that they can lie."""

import struct

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def string(text, length=None):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def kv(key, kind, payload):
    return string(key) + struct.pack("<I", kind) + payload


def kv_array(key, item_kind, count, payload):
    return kv(key, ARRAY, struct.pack("<IQ", item_kind, count) + payload)


def tensor(name="t", ne=(256,), type_id=0, offset=0, n_dims=None):
    count = len(ne) if n_dims is None else n_dims
    dims = struct.pack(f"<I{len(ne)}Q", count, *ne)
    return string(name) + dims + struct.pack("<IQ", type_id, offset)


def gguf_file(
    kvs=(),
    tensors=(),
    data=b"",
    magic=b"GGUF",
    version=3,
    n_tensors=None,
    n_kv=None,
    alignment=32,
):
    head = magic + struct.pack("<I", version)
    head += struct.pack("<Q", len(tensors) if n_tensors is None else n_tensors)
    head += struct.pack("<Q", len(kvs) if n_kv is None else n_kv)
    head += b"".join([*kvs, *tensors])
    return head + bytes(-len(head) % alignment) + data


def big_file(path, n_bytes):
    """A sparse file of zeros: one tensor of float32 rows of 4096."""
    rows = n_bytes // 16384
    head = gguf_file([], [tensor("x.weight", (4096, rows))])
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + rows * 16384)
    return path
