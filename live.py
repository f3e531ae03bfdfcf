"""Frames as they come: cameras, pipes, URLs. See gaze.py for the commands."""
import os
import queue
import select
import threading
import time
from fractions import Fraction

import av
import numpy as np

from data import VideoError, quarter_turns, video_stream


def read_live(path, picks):
    """Yield (rate, index in the source, upright (H, W, 3) uint8) when they come, of the frames that picks(rate), an
    iterator of indices, names; all of the size of the first. VideoError, also when the stream breaks later."""
    try:
        camera = "v4l2" if path.startswith("/dev/video") else None
        with av.open(path, format=camera, metadata_errors="ignore") as container:
            stream = video_stream(container, path)
            stream.codec_context.thread_count = 1  # with more, the decoder holds back as many frames
            rate, size = stream.average_rate or stream.guessed_rate or Fraction(25), {}
            indices = picks(rate)
            wanted = next(indices)
            for i, frame in enumerate(container.decode(stream)):
                if i == wanted:
                    size = size or {"width": frame.width, "height": frame.height}
                    yield rate, i, np.rot90(frame.to_ndarray(format="rgb24", **size), quarter_turns(frame))
                    wanted = next(indices, None)
                if wanted is None:
                    return
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: cannot be read as a video stream ({error})") from error


def in_background(items, stop):
    """Yield (*item, time when it came). A thread reads them, so that a silent camera or pipe can still be left."""
    found = queue.Queue(2)

    def put(item):
        came = time.perf_counter()
        while not stop.is_set():
            try:
                return found.put((item, came), timeout=0.2)
            except queue.Full:
                pass

    def read():
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(None)
        except Exception as error:  # whatever it is, it belongs to the main thread
            put(error)

    threading.Thread(target=read, daemon=True).start()
    while not stop.is_set() and not typed_q():
        try:
            item, came = found.get(timeout=0.1)
        except queue.Empty:
            continue
        if item is None:
            return
        if isinstance(item, Exception):
            raise item
        yield *item, came


def typed_q():
    """Whether q and Enter were typed. Reads from a terminal only, and not from the background: that stops a job."""
    if not os.isatty(0) or not select.select([0], [], [], 0)[0]:
        return False
    return os.tcgetpgrp(0) == os.getpgrp() and b"q" in os.read(0, 4096)
