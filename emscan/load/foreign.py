"""Names the files that emscan does not load, so that a refusal says what the file is."""

from __future__ import annotations

from emscan.load.source import ZIP_MAGIC, Source

READABLE = (
    "emscan reads files of torch.save, .safetensors, TorchScript, torch.export and Hugging Face folders; "
    "save the model as one of these"
)  # fmt: skip

_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"GGUF", "a GGUF model", READABLE),
    (0, b"ggjt", "a GGML model", READABLE),
    (0, b"lmgg", "a GGML model", READABLE),
    (0, b"tjgg", "a GGML model", READABLE),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)", READABLE),
    (0, b"\x93NUMPY", "a NumPy array", READABLE),
    (0, b"\x1f\x8b", "a gzip archive", READABLE),
    (0, b"BZh", "a bzip2 archive", "unpack it first"),
    (0, b"\xfd7zXZ\x00", "an xz archive", "unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (0, b"Rar!\x1a\x07", "a RAR archive", "unpack it first"),
    (0, b"ftrt", "a TensorRT engine", READABLE),
    (0, b"PAR1", "a Parquet file", READABLE),
    (0, b"SQLite format 3\x00", "an SQLite database", READABLE),
    (0, b"\x89PNG", "a PNG image", READABLE),
    (0, b"\xff\xd8\xff", "a JPEG image", READABLE),
    (0, b"%PDF", "a PDF document", READABLE),
    (0, b"\x7fELF", "an executable", READABLE),
    (0, b"MZ", "an executable", READABLE),
    (4, b"TFL3", "a TensorFlow Lite model", READABLE),
    (4, b"ET12", "an ExecuTorch program", READABLE),
    (4, b"ET13", "an ExecuTorch program", READABLE),
    (257, b"ustar", "a tar archive", "unpack it first"),
)
# What has no mark of its own at its beginning: the name decides.
_SUFFIXES = {
    ".onnx": ("an ONNX model", READABLE),
    ".msgpack": ("a Flax checkpoint", READABLE),
    ".pb": ("a TensorFlow graph", READABLE),
    ".mlmodel": ("a Core ML model", READABLE),
    ".pdiparams": ("a PaddlePaddle model", READABLE),
    ".pdmodel": ("a PaddlePaddle model", READABLE),
    ".param": ("an NCNN model", READABLE),
}


def describe(source: Source) -> tuple[str, str]:
    """Return what a file is, with its article, and what to do about it; only its first bytes are read."""
    head = source.head
    if not head:
        return "an empty file", "copy or save it again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file it stands for", "fetch it with `git lfs pull`"
    if head.startswith(ZIP_MAGIC):
        return _describe_zip(source)
    for offset, magic, what, hint in _MAGIC:
        if head[offset:].startswith(magic):
            return what, hint
    if not head.strip(b"\0"):
        return "a file that begins with zeros: a copy or download that broke off", "copy or download it again"
    if source.suffix in _SUFFIXES:
        return _SUFFIXES[source.suffix]
    if _is_onnx(head):
        return _SUFFIXES[".onnx"]
    start = head[:512]
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page", "a download may have failed: fetch the file again"
    if text.startswith((b"{", b"[")) and _is_text(start):
        return "a JSON document", READABLE
    if _is_text(start):
        return "plain text", READABLE
    return "of no format that emscan knows", READABLE


def _describe_zip(source: Source) -> tuple[str, str]:
    if source.names is None:
        return "a zip archive that is cut short or damaged", "copy or save it again"
    if source.names and all(name.endswith(".npy") for name in source.names):
        return "a NumPy archive of arrays", "pass arrays with --probe; " + READABLE
    if any(name.endswith((".keras", "model.weights.h5")) for name in source.names):
        return "a Keras model", READABLE
    if any(name.endswith(".mar") or name == "MAR-INF/MANIFEST.json" for name in source.names):
        return "a TorchServe archive", "unpack it and give the .pt file inside"
    return "a zip archive that holds no model", READABLE


def _is_onnx(head: bytes) -> bool:
    """Whether the file starts like ONNX's protobuf: its IR version, then the name of the producer."""
    return head[:1] == b"\x08" and head[2:3] == b"\x12" and head[1] < 32


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        text = head[: error.start].decode("utf-8")
        if len(head) - error.start > 3:  # more than a character cut in two
            return False
    return all(character.isprintable() or character in "\t\r\n\f" for character in text)
