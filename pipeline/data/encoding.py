"""Bytes of a file that a person made, as text: byte order marks, UTF-16, compressed files.

What is no text is named, so that nobody has to guess from the place where decoding stopped.
"""

import bz2
import codecs
import gzip
import lzma
import re
import zlib

from infra.errors import DataError

_PACKED = (
    (b"\x1f\x8b", gzip.decompress, "gzip"),
    (b"BZh", bz2.decompress, "bzip2"),
    (b"\xfd7zXZ\0", lzma.decompress, "xz"),
)
_MARKED = (
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32-LE"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "UTF-32-BE"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
)
_OTHER = (
    (b"PK\x03\x04", "a zip archive (as .xlsx files are); unpack it, or export its table"),
    (b"PAR1", "a Parquet file; write its rows as JSON lines, or name its folder as a hub: source"),
    (b"ARROW1", "an Arrow file; write its rows as JSON lines, or name its folder as a hub: source"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; decompress it, or use gzip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"Rar!\x1a\x07", "a RAR archive; unpack it"),
    (b"\x04\x22\x4d\x18", "compressed with lz4; decompress it, or use gzip"),
    (b"SQLite format 3\0", "an SQLite database; export its rows"),
    (b"%PDF-", "a PDF"),
    (b"version https://git-lfs.github.com/", "a pointer of Git LFS, without the file itself; run git lfs pull"),
)
_PAGE = re.compile(rb"\s*<(?:!doctype\s+html|html|\?xml)\b", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")


def text_of(data: bytes, where: str) -> str:
    """The text of a file: UTF-8, or UTF-16 or UTF-32 with a byte order mark, which is dropped; as it is or compressed
    with gzip, bzip2 or xz.

    Raises DataError, beginning with `where`, that says what the bytes are instead, or the line at which they stop to
    be text.
    """
    for sign, unpack, name in _PACKED:
        if data.startswith(sign):
            try:
                data = unpack(data)
            except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
                raise DataError(
                    f"{where}: {name}-compressed, but not to its end ({error}); fetch or pack it again"
                ) from error
    for sign, what in _OTHER:
        if data.startswith(sign):
            raise DataError(f"{where}: {what}")
    if data[257:262] == b"ustar":
        raise DataError(f"{where}: a tar archive; unpack it, and name a file of it")
    if _PAGE.match(data):
        raise DataError(
            f"{where}: an HTML or XML page, perhaps a server's answer in place of the file; fetch the file again"
        )
    mark, encoding = next(((mark, name) for mark, name in _MARKED if data.startswith(mark)), (b"", "UTF-8"))
    if encoding == "UTF-8" and (zero := data.find(b"\0")) >= 0:
        line = data[:zero].count(b"\n") + 1
        raise DataError(
            f"{where}, line {line}: a zero byte, which texts do not have (UTF-16 without a byte order mark?); save it "
            "as UTF-8"
        )
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = data[len(mark) :][: error.start].decode(encoding, errors="replace").count("\n") + 1
        raise DataError(
            f"{where}, line {line}: not {encoding} at byte {len(mark) + error.start} of the file; save it as UTF-8"
        ) from error


def has_lone_surrogate(text: str) -> bool:
    """Whether half of a surrogate pair stands alone, as in `"\\ud83d"`: no encoding can write that."""
    return not text.isascii() and _SURROGATE.search(text) is not None
