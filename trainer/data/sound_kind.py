"""Which files are sounds: by the suffix of their name, and by their first bytes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

HEAD_BYTES = 4096
# Of what libsndfile reads, and of what FFmpeg reads besides. Which of them decodes a file is told by its content.
SNDFILE_SUFFIXES = frozenset((
    ".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".mpga", ".aif",
    ".aiff", ".aifc", ".caf", ".au", ".snd", ".voc", ".8svx",
))
FFMPEG_SUFFIXES = frozenset((
    ".m4a", ".m4b", ".m4p", ".m4r", ".aac", ".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".webm", ".mka", ".mkv", ".wma",
    ".asf", ".wmv", ".ape", ".wv", ".tta", ".mpc", ".tak", ".dsf", ".dff", ".spx", ".ogx", ".ogv", ".ac3", ".eac3",
    ".dts", ".amr", ".flv", ".avi", ".mts", ".m2ts",
))
SOUND_SUFFIXES = SNDFILE_SUFFIXES | FFMPEG_SUFFIXES
# Of what lies beside music and is none: these files are not opened.
OTHER_SUFFIXES = frozenset((
    *(".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".xls", ".xlsx", ".parquet", ".arrow", ".xml", ".html", ".htm"),
    *(".yaml", ".yml", ".toml", ".ini", ".cfg", ".log", ".nfo", ".sfv", ".md5", ".sha256", ".db", ".sqlite", ".lrc"),
    *(".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".svg", ".heic", ".ico", ".psd", ".srt"),
    *(".pdf", ".doc", ".docx", ".odt", ".ods", ".rtf", ".pages", ".gdoc", ".gsheet", ".gslides", ".url", ".lnk"),
    *(".m3u", ".m3u8", ".pls", ".cue", ".xspf", ".wpl", ".mid", ".midi", ".musicxml", ".mxl", ".vtt", ".torrent"),
    *(".als", ".asd", ".alp", ".flp", ".logicx", ".ptx", ".ptf", ".rpp", ".reapeaks", ".cpr", ".npr", ".aup", ".aup3"),
    *(".sfk", ".pek", ".pkf", ".ovw", ".band", ".song", ".zip", ".rar", ".7z", ".gz", ".xz", ".zst", ".tar", ".tgz"),
    *(".py", ".pyc", ".sh", ".bat", ".js", ".ts", ".css", ".ipynb", ".exe", ".dll", ".so", ".npy", ".npz", ".pt"),
    *(".pth", ".ckpt", ".safetensors", ".bin", ".bak", ".tmp", ".lock", ".crdownload", ".part", ".partial"),
    *(".download", ".icloud", ".nextcloud", ".owncloud", ".cloud", ".cloudf", ".rsls"),
))


@dataclass(frozen=True, kw_only=True)
class SoundKind:
    """What a file is by its first bytes.

    label    for people
    demuxer  of FFmpeg, should libsndfile not read it
    """

    label: str
    demuxer: str


# The first that fits. Most are told by a magic number; the frames of MPEG audio by a header whose bits are in order
# (ISO 11172-3, 2.4.1.3), of which 0xFFFE, the mark of UTF-16, is none.
_BITS = bytes(byte for byte in range(256) if byte >> 4 not in (0, 15) and byte >> 2 & 3 != 3)
_MPEG = b"\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd][" + b"".join(b"\\x%02x" % byte for byte in _BITS) + b"]"
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (rb"(?:RIFF|RIFX|RF64|BW64)....WAVE", "WAV", "wav"),
    (rb"RIFF....AVI ", "AVI", "avi"),
    (rb"fLaC", "FLAC", "flac"),
    (rb"OggS", "Ogg", "ogg"),
    (rb"FORM....AIF[FC]", "AIFF", "aiff"),
    (rb"FORM....(?:8SVX|16SV)|FRM8.{8}DSD ", "IFF", "iff"),
    (rb"caff\0[\1\2]", "CAF", "caf"),
    (rb"\.snd|dns\.", "AU", "au"),
    (rb"riff\x2e\x91\xcf\x11", "W64", "w64"),
    (rb"Creative Voice File", "VOC", "voc"),
    (rb"\0...(?:ftyp|moov|wide|free|skip|pnot)|....(?:ftypM|mdat)", "MP4 or M4A", "mov"),
    (rb"\x1a\x45\xdf\xa3", "WebM or Matroska", "matroska"),
    (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "WMA", "asf"),
    (rb"FLV\x01", "FLV", "flv"),
    (rb"MAC ", "Monkey's Audio", "ape"),
    (rb"wvpk", "WavPack", "wv"),
    (rb"TTA1", "TTA", "tta"),
    (rb"MPCK", "Musepack", "mpc8"),
    (rb"MP\+", "Musepack", "mpc"),
    (rb"tBaK", "TAK", "tak"),
    (rb"DSD \x1c", "DSD", "dsf"),
    (rb"#!AMR", "AMR", "amr"),
    (rb"\x7f\xfe\x80\x01", "DTS", "dts"),
    (rb"\x0b\x77", "AC-3", "ac3"),
    (rb"\x47.{187}\x47.{187}\x47", "MPEG transport stream", "mpegts"),
    (rb"\xff[\xf0\xf1\xf8\xf9]", "AAC", "aac"),
    (_MPEG, "MP3", "mp3"),
)
_PATTERNS = tuple((re.compile(pattern, re.DOTALL), SoundKind(label=label, demuxer=demuxer))
                  for pattern, label, demuxer in _KINDS)


def kind_at(descriptor: int) -> SoundKind | None:
    """What sound an open file holds, by its first bytes or by those behind its ID3 tag; None for what is not known."""
    head = os.pread(descriptor, HEAD_BYTES, id3_end(descriptor))
    return next((kind for pattern, kind in _PATTERNS if pattern.match(head)), None)


def id3_end(descriptor: int) -> int:
    """Where the ID3v2 tags at the start of an open file end: 0 without one. Source: id3.org, ID3v2.4, section 3.1."""
    at = 0
    for _ in range(4):  # some taggers leave the former tag in place
        head = os.pread(descriptor, 10, at)
        if len(head) < 10 or head[:3] != b"ID3" or any(byte & 128 for byte in head[6:]):
            break
        at += 10 + sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        at += 10 if head[5] & 16 else 0  # a footer
    return at


def is_sound_file(path: str, suffix: str) -> bool:
    """Whether a file is a sound by its name; where its suffix says nothing, by its content. `suffix` is lower case."""
    if suffix in SOUND_SUFFIXES or suffix in OTHER_SUFFIXES:
        return suffix in SOUND_SUFFIXES
    try:
        # Nothing but a regular file is read, and a pipe into which nobody writes is not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return kind_at(descriptor) is not None
    except OSError:  # a pipe, a device, a folder
        return False
    finally:
        os.close(descriptor)
