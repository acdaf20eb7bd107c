"""Reading files: the right frames, no more than asked for, and clear words for what cannot be read."""

import io
import struct

import numpy as np
import pytest

from qwen3_vl.processing import video_reading
from qwen3_vl.processing.video_reading import AvVideo, open_video, read_video


av = pytest.importorskip("av", reason="PyAV is absent: pip install av")

FORMATS = {
    "mp4": {},
    "mp4, one key frame": {"group": 250},
    "mp4, key frames only": {"group": 1, "bf": "0"},
    "matroska": {"container": "matroska"},
    "mpeg4 in avi": {"container": "avi", "codec": "mpeg4"},
    "transport stream, no index": {"container": "mpegts"},
    "bare stream, no time stamps": {"container": "h264"},
}


def decode_all(content):
    with av.open(io.BytesIO(content)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", FORMATS)
def test_frames_are_those_of_decoding_everything(make_video, name):
    content = make_video(90, **FORMATS[name])
    video, plain = open_video(content), decode_all(content)
    assert video.metadata.total_num_frames == len(plain) == 90
    for indices in (range(90), [0, 3, 3, 41, 42, 88], [89], [55, 60]):
        frames = list(video.frames(indices))
        assert len(frames) == len(indices)
        assert all(np.array_equal(frame, plain[index]) for frame, index in zip(frames, indices, strict=True))


def test_metadata(mp4):
    metadata = open_video(mp4).metadata
    assert (metadata.fps, metadata.duration, metadata.height, metadata.width) == (25.0, 2.4, 64, 96)
    assert metadata.video_backend == "pyav"


def test_only_what_is_needed_is_decoded(make_video, monkeypatch):
    content = make_video(200, group=20, bf="0")
    decoded = 0
    plain = AvVideo._decoded

    def counting(self, *args):
        nonlocal decoded
        for frame in plain(self, *args):
            decoded += 1
            yield frame

    monkeypatch.setattr(AvVideo, "_decoded", counting)
    list(open_video(content).frames([0, 101, 181]))
    # One, then two from the key frame 100, then two from 180; and what the encoder's own key frames add.
    assert decoded <= 10


def test_every_kind_of_source(mp4, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(mp4)
    expected, _ = read_video(mp4)
    for source in (str(path), path, f"file://{path}", io.BytesIO(mp4)):
        assert np.array_equal(read_video(source)[0], expected)


def test_sampling_is_noted(mp4):
    frames, metadata = read_video(mp4, lambda metadata: [0, metadata.total_num_frames - 1])
    assert frames.shape == (2, 64, 96, 3)
    assert metadata.frames_indices.tolist() == [0, 59]


def test_a_turned_phone_video_is_read_upright(make_video):
    content = make_video(6)
    # The display matrix stands 40 bytes into the track header; this one turns a quarter clockwise.
    place = content.rindex(b"tkhd") + 4 + 40
    turned = (
        content[:place] + struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30) + content[place + 36 :]
    )
    frames, _ = read_video(turned)
    assert np.array_equal(frames[0], np.rot90(read_video(content)[0][0], -1))


@pytest.mark.parametrize("content", [b"", b"no video at all", "cut"])
def test_damaged_files(mp4, content):
    content = mp4[: len(mp4) // 2] if content == "cut" else content
    with pytest.raises(ValueError, match=f"video of {len(content)} bytes cannot be decoded") as caught:
        read_video(content)
    assert "\n" not in str(caught.value)


def test_a_file_that_ends_early_gives_the_frames_it_has(make_video):
    content = make_video(90, container="matroska")
    frames, metadata = read_video(content[: len(content) // 2])
    assert 10 < len(frames) == metadata.total_num_frames < 90


def test_sound_is_no_video():
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="has no video stream"):
        open_video(file.getvalue())


@pytest.mark.parametrize(
    "indices, message", [([], "must be numbers from 0 to 59"), ([60], "0 to 59, got"), ([5, 2], "must ascend")]
)
def test_wrong_frame_numbers(mp4, indices, message):
    with pytest.raises(ValueError, match=message):
        read_video(mp4, lambda metadata: indices)


def test_what_is_missing_is_named(mp4, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"video 'absent\.mp4' is no existing file"):
        read_video("absent.mp4")
    with pytest.raises(ValueError, match="backend must be 'pyav' or 'torchcodec', got 'x'"):
        open_video(mp4, "x")

    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr(video_reading, "import_module", refuse)
    with pytest.raises(ImportError, match=r"needs PyAV: pip install qwen3-vl\[video\]"):
        read_video(mp4)
