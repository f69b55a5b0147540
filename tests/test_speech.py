"""Speech: whole, mono, 16 kHz, by the voice that was asked for."""

from __future__ import annotations

import gc
import io
import subprocess
import sys

import numpy as np
import pytest
import soundfile

pytest.importorskip("espeakng_loader", reason="speech is an optional extra")

from jobs.speech import render
from mmagent.speech import SAMPLE_RATE_HZ, Clip, SpeechError, Synthesizer, encode


@pytest.fixture(scope="module")
def synthesizer() -> Synthesizer:
    return Synthesizer()


def test_a_clip_is_mono_flac_of_16_khz(synthesizer: Synthesizer) -> None:
    data = encode(synthesizer.say(Clip("is there a circle?", "en-us+f3")))
    about = soundfile.info(io.BytesIO(data))
    assert (about.format, about.subtype, about.samplerate, about.channels) == ("FLAC", "PCM_16", SAMPLE_RATE_HZ, 1)
    assert 0.5 < about.duration < 2.0


def test_the_last_sound_fades_out_and_no_silence_follows(synthesizer: Synthesizer) -> None:
    sound = synthesizer.say(Clip("is there a circle?", "en-us+f3"))
    assert np.abs(sound[-160:]).max() < 0.02  # the last 10 ms
    assert np.abs(sound[-1600:]).max() > 0.001


def test_voice_speed_and_pitch_are_heard(synthesizer: Synthesizer) -> None:
    text = "is there not a yellow shape in the image?"
    slow, fast = (synthesizer.say(Clip(text, "en-us+m1", rate_wpm=rate)) for rate in (130, 220))
    assert len(slow) > 1.3 * len(fast)

    def pitch_hz(clip: Clip) -> float:
        """The median over frames of the lag at which a frame is most like itself."""
        frames = np.lib.stride_tricks.sliding_window_view(synthesizer.say(clip), 640)[::320]
        lags = np.arange(40, 230)
        loud = frames[np.square(frames).mean(axis=1) > 1e-3]
        likeness = np.stack([(loud[:, :-lag] * loud[:, lag:]).mean(axis=1) for lag in lags], axis=1)
        return float(np.median(SAMPLE_RATE_HZ / lags[likeness.argmax(axis=1)]))

    assert pitch_hz(Clip(text, "en-us+f3")) > 1.2 * pitch_hz(Clip(text, "en-us+m3"))
    assert pitch_hz(Clip(text, "en-us", pitch=80)) > 1.2 * pitch_hz(Clip(text, "en-us", pitch=20))


@pytest.mark.parametrize(
    ("voice", "words"),
    [
        ("xx-yy", "no voice 'xx-yy'"),
        ("en-gb", "no voice 'en-gb'.*en-gb-scotland"),  # espeak's own name of it is `en`
        ("en-us+nobody", "no variant 'nobody'.*Annie"),
        ("en-us+", "no variant ''"),
        ("+f3", "no voice ''"),
    ],
)
def test_an_unknown_voice_is_an_error_that_names_it(synthesizer: Synthesizer, voice: str, words: str) -> None:
    with pytest.raises(SpeechError, match=words):
        synthesizer.say(Clip("hello", voice))


def test_a_second_synthesizer_may_come_and_go(synthesizer: Synthesizer) -> None:
    assert len(Synthesizer().say(Clip("one", "en-us"))) > 1000
    gc.collect()
    assert len(synthesizer.say(Clip("two", "en-us"))) > 1000


def test_nothing_to_say(synthesizer: Synthesizer) -> None:
    with pytest.raises(SpeechError, match=r"only silence|said nothing"):
        synthesizer.say(Clip("", "en-us"))


def test_many_clips_come_in_order_from_processes() -> None:
    clips = [Clip(f"number {number}", "en-us", 150 + number) for number in range(100)]
    out = list(render(clips, 2))
    assert [clip for clip, _ in out] == clips
    durations = [soundfile.info(io.BytesIO(data)).duration for _, data in out]
    assert min(durations) > 0.3


def test_voices_are_checked_before_work_begins() -> None:
    with pytest.raises(SpeechError, match="no variant 'zz'"):
        next(render([Clip("a", "en-us"), Clip("b", "en-us+zz")], 1))


def test_without_the_synthesiser_the_command_to_install_it_is_named() -> None:
    code = """
import sys
sys.modules["espeakng_loader"] = None  # what Python keeps of a package that is not there
from mmagent import speech
try:
    speech.Synthesizer()
except speech.SpeechError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install espeakng-loader" in done.stdout
