"""MP3s without a count of their frames, as many encoders write them: read to their end."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from mmagent import media, mp3


def encoded(rate_hz: int, mode: str, channels: int = 1, seconds: float = 3.7) -> bytes:
    """Noise that grows louder, so that a bit rate that may vary does."""
    sound = np.random.default_rng(0).normal(size=(int(rate_hz * seconds), channels)) * 0.1
    sound *= np.linspace(0, 1, len(sound))[:, None] ** 4
    out = io.BytesIO()
    with soundfile.SoundFile(
        out, "w", rate_hz, channels, format="MP3", subtype="MPEG_LAYER_III", bitrate_mode=mode, compression_level=0.5
    ) as file:
        file.write(sound)
    return out.getvalue()


def uncounted(data: bytes) -> bytes:
    """Without its first frame, which counts the others."""
    frame = mp3._frame(data[:4])
    assert frame is not None
    assert data[frame.told_at : frame.told_at + 4] in (b"Xing", b"Info")
    return data[frame.bytes :]


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize(("rate_hz", "channels"), [(8_000, 1), (16_000, 1), (22_050, 2), (44_100, 1), (48_000, 2)])
def test_all_of_it_is_heard(rate_hz: int, channels: int, mode: str) -> None:
    whole = encoded(rate_hz, mode, channels)
    assert mp3.counted(whole) is whole
    bare = uncounted(whole)
    heard = media.decode_audio(bare, rate_hz, media.Limits())
    told = len(media.decode_audio(whole, rate_hz, media.Limits()))
    assert told <= len(heard) <= told + 4 * 1152  # without the tag nobody knows what an encoder put at both ends
    tagged = b"ID3\x04\x00\x00\x00\x00\x01\x02" + bytes(130) + bare
    assert len(media.decode_audio(tagged, rate_hz, media.Limits())) == len(heard)


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff\xfb\x90\x00", b"RIFF....WAVE", b"ID3", b"\xff\xd8\xff\xe0"])
def test_what_is_none_stays_as_it_is(data: bytes) -> None:
    assert mp3.counted(data) == data


def test_a_file_that_ends_within_a_frame_is_read_to_the_last_whole_one() -> None:
    bare = uncounted(encoded(44_100, "CONSTANT"))
    whole = len(media.decode_audio(bare, 44_100, media.Limits()))
    assert whole - 3 * 1152 <= len(media.decode_audio(bare[:-10], 44_100, media.Limits())) <= whole
