"""The length of an MP3 that does not tell it.

Most encoders write a first frame without sound that says how many follow (``Xing`` or ``Info``). Where there is none,
decoders guess by the bit rate of the first frame, and read no further than that: of a file whose bit rate varies, half
may be lost. Frames are counted here, and such a first frame is put before them.
"""

from __future__ import annotations

from typing import NamedTuple

_KBIT_S = {  # of layer III, by the header's index; 0: free or none
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0),  # MPEG 1
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),  # MPEG 2 and 2.5
}
_RATES_HZ = {3: (44_100, 48_000, 32_000, 0), 2: (22_050, 24_000, 16_000, 0), 0: (11_025, 12_000, 8_000, 0)}
_LAYER_3, _ONE_CHANNEL = 1, 3
_ROOMY = 9  # the index of a bit rate whose frames have room for a count at every sample rate
_TOLD = (b"Xing", b"Info")


class _Frame(NamedTuple):
    bytes: int
    told_at: int  # where a count stands, behind the header and what describes the sound


def counted(data: bytes) -> bytes:
    """An MP3 with its count of frames; whatever tells its length already, or is none, as it is."""
    start = _behind_tag(data)
    frame = _frame(data[start : start + 4])
    if frame is None:
        return data
    told_at = start + frame.told_at
    if data[told_at : told_at + 4] in _TOLD:
        return data
    place, count = start, 0
    while (found := _frame(data[place : place + 4])) is not None and place + found.bytes <= len(data):
        place, count = place + found.bytes, count + 1
    if count < 2:  # two bytes that look like a frame are in many files
        return data
    header = bytearray(data[start : start + 4])
    header[1] |= 1  # no checksum
    header[2] = _ROOMY << 4 | header[2] & 0b1101  # no padding
    made = _frame(bytes(header))
    assert made is not None
    told = bytes(header) + bytes(frame.told_at - 4) + _TOLD[0] + (1).to_bytes(4, "big") + count.to_bytes(4, "big")
    return told + bytes(made.bytes - len(told)) + data[start:]


def _behind_tag(data: bytes) -> int:
    """Where the frames begin: behind an ID3v2 tag, whose length has seven bits a byte."""
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    size = 0
    for byte in data[6:10]:
        size = size << 7 | byte & 0x7F
    return 10 + size


def _frame(header: bytes) -> _Frame | None:
    """What the four bytes of a frame's header say (ISO/IEC 11172-3, 2.4.1.3); none: they are no header of layer III."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, header[1] >> 1 & 3
    first = version == 3
    rate_hz = _RATES_HZ.get(version, (0,) * 4)[header[2] >> 2 & 3]
    kbit_s = _KBIT_S[first][header[2] >> 4]
    if layer != _LAYER_3 or not rate_hz or not kbit_s:
        return None
    samples_8 = 144 if first else 72  # of a frame, by 8
    one = header[3] >> 6 == _ONE_CHANNEL
    described = (17 if one else 32) if first else (9 if one else 17)
    return _Frame(samples_8 * kbit_s * 1000 // rate_hz + (header[2] >> 1 & 1), 4 + described)
