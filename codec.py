"""What moved, as a video's encoder saw it: motion vectors are read from the file, no pixel is looked at.

H.264, MPEG-4 and older codecs give vectors; HEVC, VP9, AV1 and codecs that code every frame by itself give none. PyAV
does not hand out residuals, so a change that no vector describes (a light that goes on) is not seen here. Vectors lead
to the frame that a block was predicted from; with B-frames that may be several frames away, and nothing tells how many.
"""
import av
import numpy as np
import torch
import torch.nn.functional as F

from data import VideoError, quarter_turns, resize_center, video_stream

CELL = 4  # pixels: no block that carries a vector is smaller
BLOCK = 16  # pixels: side of a macroblock, in which frames are coded


def lengths(vectors, h, w):
    """Vectors of one frame of h x w pixels, PyAV's structured array -> (h / 4, w / 4, rounded up) their length in
    pixels in every cell; where several lie (frames predicted from two sides) their mean.

    A block that is coded afresh has no vector and counts as unmoved; to count it as moved by 4 to 16 pixels changed
    losses in eval.py by less than 3 %, in both directions."""
    total, count = np.zeros((2, -(-h // BLOCK) * BLOCK // CELL, -(-w // BLOCK) * BLOCK // CELL))  # whole macroblocks
    length = np.hypot(vectors["motion_x"], vectors["motion_y"]) / np.maximum(vectors["motion_scale"], 1)
    high, wide = (vectors[k].astype(int) for k in ("h", "w"))
    y, x = ((vectors[k] - n // 2) // CELL for k, n in (("dst_y", high), ("dst_x", wide)))  # dst: a block's centre
    for dy in range(high.max() // CELL):
        for dx in range(wide.max() // CELL):
            use = (dy < high // CELL) & (dx < wide // CELL) & (y + dy < len(total)) & (x + dx < total.shape[1])
            use &= (y + dy >= 0) & (x + dx >= 0)
            at = (y + dy)[use], (x + dx)[use]
            np.add.at(total, at, length[use])
            np.add.at(count, at, 1)
    return (total / np.maximum(count, 1))[:-(-h // CELL), :-(-w // CELL)]


def read_motion(path, n_frames, size, stride=1):
    """(n_frames, size, size) float32: how far, in pixels of the file, what lies here has moved since the clip frame
    before (the vectors of all source frames in between added up), 0 in the first frame. Frames and geometry are those
    of data.read_frames(path, n_frames, 0, stride) and data.resize_crop. None: no frame after the first has vectors.

    VideoError: a file that cannot be decoded."""
    frames, known, shape, reason, i = [], False, None, "not one frame in its video stream", 0
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = video_stream(container, path)
            stream.codec_context.options = {"flags2": "+export_mvs"}
            stream.codec_context.thread_count = 1
            for i, frame in enumerate(container.decode(stream)):
                if i > (n_frames - 1) * stride:
                    break
                vectors, h, w = frame.side_data.get("MOTION_VECTORS"), frame.height, frame.width
                has = vectors is not None and len(vectors) > 0
                moved = lengths(vectors.to_ndarray(), h, w) if has else np.zeros((-(-h // CELL), -(-w // CELL)))
                moved = moved.repeat(CELL, 0).repeat(CELL, 1)[:h, :w]
                moved = torch.from_numpy(np.rot90(moved, quarter_turns(frame)).astype(np.float32))[None]
                shape = shape or moved.shape[-2:]
                if moved.shape[-2:] != shape:  # the stream has changed size: all frames are given that of the first
                    moved = F.interpolate(moved[None], shape)[0]
                known |= has and i > 0
                if (i - 1) % stride == 0 or i == 0:  # the first source frame after a clip frame
                    frames.append(moved * (i > 0))
                else:
                    frames[-1] = frames[-1] + moved
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = error
    if shape is None:
        raise VideoError(f"{path}: cannot be decoded as a video ({reason})")
    if not known and i > 0:
        return None
    frames += [torch.zeros_like(frames[0])] * (n_frames - len(frames))  # a short video repeats its last frame
    return resize_center(torch.stack(frames), size)[:, 0]
