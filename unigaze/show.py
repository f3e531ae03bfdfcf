"""
Where do the faces in my picture or video look?

    python -m unigaze.show --video=my.mp4 --ckpt=out/toy/unigaze/best
    python -m unigaze.show --video=holiday/ --ckpt=unigaze_b16_joint        # a folder of pictures and films
    python -m unigaze.show --video=/dev/video0 --mirror=true                # a camera; also -: stdin, or a URL
    python -m unigaze.show --video=me.mp4 --targets=targets.csv             # fits out/unigaze_show/calibration.json
    python -m unigaze.show --video=more.mp4 --calibration=calibration.json  # ... and uses it
    python -m unigaze.show --onnx=unigaze.onnx --ckpt=unigaze_b16_joint     # export, compared with torch

Faces are found (unigaze/find.py), normalised (unigaze/normalise.py) and given to the model in batches. Into --out go a
picture with arrows per picture, a film per film, and gaze.csv with a row per face and frame:
    source, frame, time            file, number from 0, seconds
    face                           number that follows a face through a film
    pitch, yaw                     degrees in the normalised crop: up, and to the left of the picture
    camera_pitch, camera_yaw       the same in the camera. 0, 0 is straight at it only for a face in the middle
    head_pitch, head_yaw           of the head in the crop; empty when no landmarks were found
    left, top, right, bottom       box in pixels
    confidence                     of the face, not of its gaze

Without --camera the focal length is guessed for each face from its size: directions relative to the line from camera to
face are right, distances and angles relative to the room are not. The weights decide what the arrows are worth: with
the toy's they mean little on photographs.

targets.csv has the columns frame, x, y, z: where the person looks in a frame, in mm in the camera (x right, y down, z
away). The camera itself is 0, 0, 0. Three directions or more give an affine correction, fewer an offset.
"""

if not __package__:
    raise SystemExit("run it from the root of the repository as a module: python -m unigaze.show …")

import csv
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from data import VIDEO_SUFFIXES, VideoError, open_stream, upright, video_stream
from lib import configurator, video_out
from lib.checkpoint import take_output
from lib.run import init_processes, launch
from lib.text import written_whole
from unigaze import calibrate, find, normalise
from unigaze.model import load

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
COLORS = ("#3ddc84", "#ff5a5f", "#4aa8ff", "#ffb400", "#c77dff")
COLUMNS = ("source", "frame", "time", "face", "pitch", "yaw", "camera_pitch", "camera_yaw", "head_pitch", "head_yaw",
           "left", "top", "right", "bottom", "confidence")


@dataclass
class Config:
    video: str = ""                    # picture, video, folder of them, camera (/dev/video0), URL, or - (stdin)
    ckpt: str = "out/toy/unigaze/best"  # gaze model: a folder, a file, or the name of a released one
    out: str = "out/unigaze_show"      # folder for the results
    # faces
    faces: str = "auto"                # auto | whole: the picture is one face | left,top,right,bottom in pixels
    max_head_angle: float = 80.0       # degrees; heads turned further are left out, their eyes cannot be seen
    face_model: str | None = None      # the published 50-point model; none: six points of another face (README)
    camera: str | None = None          # fx,fy,cx,cy in pixels; none: guessed for each face
    mirror: bool = False               # the source shows people mirrored, as many webcams do: turn it back first
    # a person's own correction
    calibration: str | None = None     # file to use
    targets: str | None = None         # table of where the person looked, to fit one
    # run
    every: int = 1                     # look at every so many-th frame
    max_frames: int | None = None      # stop after so many; none: at the end
    crops: bool = False                # also write what the model sees
    onnx: str | None = None            # export the model to this file, and nothing else
    batch_size: int = 16               # frames at once; a camera has them one by one
    device: str = "auto"               # auto | cpu | cuda | mps

    def check(self):
        if not self.video and not self.onnx:
            raise ValueError("nothing to look at: write --video=my.mp4 (or a picture, a folder, a camera)")
        configurator.check_at_least(self, every=1, max_frames=1, batch_size=1)
        configurator.check_above_zero(self, "max_head_angle")
        if self.faces not in ("auto", "whole"):
            numbers(self.faces, "faces", "left,top,right,bottom")
        if self.camera:
            numbers(self.camera, "camera", "fx,fy,cx,cy")


def numbers(text, key, names):
    """Four numbers of a setting, as an array."""
    try:
        values = np.array([float(part) for part in text.split(",")])
    except ValueError:
        values = np.zeros(0)
    if len(values) != 4:
        raise ValueError(f"{key}={text} must be four numbers: {names}")
    return values


# ----------------------------------------------------------------------------------------------------------------------
# pictures in

def list_sources(path):
    """What there is to read: files of a folder, or the path itself."""
    if not Path(path).is_dir():
        live = path == "-" or "://" in path or path.startswith("/dev/")
        if not live and not Path(path).is_file():
            raise FileNotFoundError(f"video={path}: no such file (looked from {os.getcwd()})")
        return [path]
    suffixes = IMAGE_SUFFIXES + VIDEO_SUFFIXES
    files = sorted(file for file in Path(path).iterdir() if file.suffix.lower() in suffixes)
    if not files:
        raise FileNotFoundError(f"video={path}: no pictures or videos in this folder ({' '.join(suffixes)})")
    return [str(file) for file in files]


@dataclass
class Frame:
    number: int
    seconds: float
    image: np.ndarray          # (H, W, 3) uint8 RGB
    rate: float | None = None  # frames per second; None: a picture


def turn_back(frames):
    """Frames of a mirrored source as they really are."""
    for frame in frames:
        frame.image = np.ascontiguousarray(frame.image[:, ::-1])
        yield frame


def read_picture(path):
    """Yield the Frame of a picture, or those of an animated WebP or PNG, which FFmpeg does not read."""
    try:
        image = Image.open(path)
        is_animated = image.format in ("WEBP", "PNG") and getattr(image, "n_frames", 1) > 1
        rate = None
        for i in range(image.n_frames if is_animated else 1):
            if is_animated:
                image.seek(i)
                image.load()  # tells the milliseconds that this frame stays
                rate = rate or 1000 / max(10, image.info.get("duration") or 100)
            upright_image = ImageOps.exif_transpose(image)  # phones store pictures turned
            yield Frame(i, i / (rate or 1), np.array(upright_image.convert("RGB")), rate)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a damaged PNG
        raise VideoError(f"{path}: cannot be read as a picture ({error})") from error


def read_frames(path):
    """Yield the Frames of a picture, film or stream. VideoError names a source that cannot be read."""
    if Path(path).suffix.lower() in IMAGE_SUFFIXES:
        yield from read_picture(path)
        return

    size = {}
    try:
        with open_stream(path) as container:
            stream = video_stream(container, path)
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            for i, frame in enumerate(container.decode(stream)):
                size = size or {"width": frame.width, "height": frame.height}  # of all frames, as films need it
                image = upright(frame.to_ndarray(format="rgb24", **size), frame)
                seconds = i / rate if frame.time is None else float(frame.time)
                yield Frame(i, seconds, np.ascontiguousarray(image), rate)
    except (av.FFmpegError, OSError, ValueError) as error:
        if not size:
            raise VideoError(f"{path}: cannot be read as a video ({error})") from error
        print(f"{path}: ends early ({error})")


# ----------------------------------------------------------------------------------------------------------------------
# from a face to a crop

@dataclass
class View:
    """A face as the model sees it."""
    face: find.Face
    K: np.ndarray              # (3, 3) camera of the picture
    centre: np.ndarray         # (3,) mm, where the arrow starts
    R: np.ndarray              # (3, 3) rotation into the virtual camera
    head: np.ndarray           # (2,) pitch, yaw of the head there; NaN without landmarks
    crop: np.ndarray           # (S, S, 3) uint8 RGB
    gaze: np.ndarray = None    # (2,) pitch, yaw, once predicted
    number: int = 0            # of the face


def guess_camera(box, shape):
    """Camera matrix as published: twice the face's box, cut at the picture's edges, is seen at four times its width."""
    left, top, right, bottom = box
    half_width = right - left
    half_height = bottom - top
    x = (left + right) / 2
    y = (top + bottom) / 2
    left = max(0, x - half_width)
    right = min(shape[1], x + half_width)
    top = max(0, y - half_height)
    bottom = min(shape[0], y + half_height)
    focal = 4 * (right - left)
    return normalise.camera_matrix(focal, focal, (left + right) / 2, (top + bottom) / 2)


def view_face(image, face, face_model, camera, size):
    """Normalise one face of a picture for a model that sees `size` pixels."""
    if camera is None:
        K = guess_camera(face.box, image.shape)
    else:
        K = normalise.camera_matrix(*camera)

    if face.points is not None:
        head_rotation, translation = normalise.head_pose(face.points, face_model, K)
        centre = normalise.face_centre(face_model, head_rotation, translation)
        R, W = normalise.normalisation(K, head_rotation, centre)
        head = normalise.head_label(R, head_rotation)
    else:
        # nothing is known but a box: it fills the crop, upright
        left, top, right, bottom = face.box
        width_mm = normalise.DISTANCE * normalise.SIZE / normalise.FOCAL
        ray = np.linalg.inv(K) @ [(left + right) / 2, (top + bottom) / 2, 1]
        centre = ray * K[0, 0] * width_mm / max(right - left, bottom - top)
        R, W = normalise.normalisation(K, np.eye(3), centre)
        head = np.full(2, np.nan)
    crop = normalise.resize(normalise.warp(image, W), size)
    return View(face, K, centre, R, head, crop)


class Tracks:
    """Numbers that stay with a face from frame to frame: it has the number of the face it overlaps most."""

    def __init__(self, patience=15):
        self.patience = patience           # frames that a face may be lost and still be the same
        self.last = {}                     # number -> (box, frame)
        self.n = 0

    def assign(self, views, frame):
        self.last = {number: seen for number, seen in self.last.items() if frame - seen[1] <= self.patience}
        free = dict(self.last)
        pairs = []
        for k, view in enumerate(views):
            for number, (box, _) in free.items():
                pairs.append((find.overlap(view.face.box, box), k, number))

        # the closest pairs first
        given = {}
        for common, k, number in sorted(pairs, reverse=True):
            if common > 0.2 and k not in given and number in free:
                given[k] = number
                del free[number]
        for k, view in enumerate(views):
            if k not in given:
                given[k] = self.n
                self.n += 1
            view.number = given[k]
            self.last[view.number] = (view.face.box, frame)


@torch.inference_mode()
def predict(model, views, device):
    """Give every view its gaze; all faces of a batch of frames go through the model together."""
    if not views:
        return
    crops = np.stack([view.crop for view in views])                            # (B, S, S, 3)
    images = torch.from_numpy(crops).permute(0, 3, 1, 2).to(device)
    gaze = model(images).float().cpu().double().numpy()
    for view, angles in zip(views, gaze, strict=True):
        view.gaze = angles


# ----------------------------------------------------------------------------------------------------------------------
# pictures out

def draw(image, views):
    """Boxes and arrows; the arrow is 168 mm long where the face is."""
    width = max(2, round(max(image.shape[:2]) / 250))
    for view in views:
        color = COLORS[view.number % len(COLORS)]
        left, top, right, bottom = view.face.box
        start, end = normalise.arrow(view.gaze, view.R, view.centre, view.K)
        pitch, yaw = np.degrees(view.gaze)
        image = video_out.draw_boxes(image, [view.face.box], color, max(1, width // 2))
        image = video_out.draw_arrow(image, start, end, color, width)
        text = f"{view.number}: {pitch:.0f}, {yaw:.0f}"
        image = video_out.draw_text(image, text, (left, max(0, top - 18)), color)
    return image


def row_of(source, frame, view):
    """One row of gaze.csv."""
    camera = normalise.to_pitchyaw(normalise.to_camera(view.gaze, view.R))
    angles = np.degrees([*view.gaze, *camera, *view.head])
    texts = ["" if np.isnan(angle) else f"{angle:.3f}" for angle in angles]
    box = [f"{edge:.1f}" for edge in view.face.box]
    return [source, frame.number, f"{frame.seconds:.3f}", view.number, *texts, *box, f"{view.face.confidence:.3f}"]


def export_onnx(model, path):
    """Write the model for uint8 RGB crops (B, 3, S, S), then compare it with torch."""
    size = model.config.image_size
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        import onnxruntime
        torch.onnx.export(model, (images,), path, input_names=["images"], output_names=["pitchyaw"],
                          dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), dynamo=True, verbose=False)
    except ImportError as error:
        raise ImportError(f"--onnx needs more packages ({error}): pip install onnx onnxscript onnxruntime") from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    more = torch.cat([images, images.flip(2), images.flip(3)])                 # another number of faces
    theirs = session.run(None, {"images": more.numpy()})[0]
    with torch.inference_mode():
        difference = np.abs(theirs - model(more).numpy()).max()
    print(f"{path} (and {path}.data, its weights): largest difference to torch {difference:.1e} radians")
    if difference > 1e-3:
        raise ValueError(f"{path} gives other angles than torch: do not use it")


# ----------------------------------------------------------------------------------------------------------------------

def choose_finder(cfg):
    """The function that finds faces. FORK: return your own."""
    if cfg.faces == "whole":
        return find.whole_picture
    if cfg.faces != "auto":
        box = numbers(cfg.faces, "faces", "left,top,right,bottom")
        return lambda image: [find.Face(box)]
    if find.is_installed():
        return find.MediaPipe()
    print(f"note: no face is looked for, the whole picture counts as one. To find faces: {find.HOW_TO_INSTALL}")
    return find.whole_picture


@dataclass
class Setup:
    """What stays the same for all frames of a run."""
    find: callable             # image -> list of find.Face
    face_model: np.ndarray     # (6, 3) mm
    camera: np.ndarray | None  # fx, fy, cx, cy
    calibration: tuple | None  # matrix, offset
    targets: dict              # frame -> (3,) mm


def set_up(cfg):
    setup = Setup(choose_finder(cfg), normalise.FACE_MODEL, None, None, {})
    if cfg.face_model:
        setup.face_model = normalise.load_face_model(cfg.face_model)
    if cfg.camera:
        setup.camera = numbers(cfg.camera, "camera", "fx,fy,cx,cy")
    if cfg.calibration:
        setup.calibration = calibrate.load(cfg.calibration)
    if cfg.targets:
        setup.targets = calibrate.read_targets(cfg.targets)
    return setup


def look(frames, n_at_once, cfg, setup, model, device):
    """Yield (frame, views, number of faces turned away) for every frame, its gazes predicted and not yet calibrated.
    Frames are taken n_at_once, and all their faces go through the model together."""
    tracks = Tracks()
    while chunk := list(islice(frames, n_at_once)):
        found = []
        for frame in chunk:
            views = []
            faces = setup.find(frame.image)
            for face in faces:
                view = view_face(frame.image, face, setup.face_model, setup.camera, model.config.image_size)
                angle = np.degrees(np.linalg.norm(view.head))                  # NaN, which passes, without landmarks
                if not angle > cfg.max_head_angle:
                    views.append(view)
            tracks.assign(views, frame.number)
            found.append((frame, views, len(faces) - len(views)))

        predict(model, [view for _, views, _ in found for view in views], device)
        yield from found


def run(cfg, model, device):
    setup = set_up(cfg)
    sources = list_sources(cfg.video)
    out = Path(cfg.out)
    take_output(out)
    rows = []
    pairs = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was seen is kept, and is whole
    for source in sources:
        try:
            is_stopped = show_source(source, cfg, setup, model, device, rows, pairs)
        except VideoError as error:
            if len(sources) == 1:
                raise
            print(f"skipped: {error}")
            continue
        if is_stopped:
            break

    with written_whole(out / "gaze.csv") as temporary:
        with open(temporary, "w", newline="", errors="surrogateescape") as file:  # names of files may not be UTF-8
            csv.writer(file).writerows([COLUMNS, *rows])
    if cfg.targets:
        calibrate.save(out / "calibration.json", pairs)
    print(f"{out}: pictures with arrows, gaze.csv")


def show_source(source, cfg, setup, model, device, rows, pairs):
    """Write what is seen in one picture, film or stream. rows gets those of gaze.csv, pairs (predicted, true) angles
    for --targets. Returns whether it was stopped by Ctrl-C or SIGTERM."""
    live = not Path(source).is_file()
    name = "live" if live else Path(source).name.replace(".", "_")              # a.jpg and a.png may lie side by side
    out = Path(cfg.out)
    frames = (frame for frame in read_frames(source) if frame.number % cfg.every == 0)
    frames = turn_back(frames) if cfg.mirror else frames
    seen = look(islice(frames, cfg.max_frames), 1 if live else cfg.batch_size, cfg, setup, model, device)

    is_stopped = False
    n_frames = 0
    n_empty = 0
    n_faces = 0
    n_turned_away = 0
    with ExitStack() as stack:
        film = None
        try:
            for frame, views, n_away in tqdm(seen, name, unit=" frames", disable=None):
                n_frames += 1
                n_empty += not views
                n_faces += len(views)
                n_turned_away += n_away

                # a frame of --targets counts if it is clear who looks there
                if frame.number in setup.targets and len(views) == 1:
                    true = normalise.gaze_label(views[0].R, views[0].centre, setup.targets[frame.number])
                    pairs.append((views[0].gaze, true))
                if setup.calibration is not None:
                    matrix, offset = setup.calibration
                    for view in views:
                        view.gaze = matrix @ view.gaze + offset

                for view in views:
                    rows.append(row_of(source, frame, view))
                    if cfg.crops:
                        video_out.save_picture(out / f"{name}_{frame.number:06d}_{view.number}.png", view.crop)
                picture = draw(frame.image, views)
                if frame.rate is None:
                    video_out.save_picture(out / f"{name}.png", picture)
                    continue
                if film is None:
                    film = stack.enter_context(video_out.VideoWriter(out / f"{name}.mp4", frame.rate / cfg.every))
                film.write(picture)
        except KeyboardInterrupt:
            is_stopped = True
            print("stopped; what was seen so far is kept")
    print(f"{source}: {n_frames} frames, {n_empty} without a face, {n_faces} faces, {n_turned_away} more turned away")
    return is_stopped


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    _, _, device = init_processes(cfg.device)
    model = load(cfg.ckpt, device)
    if cfg.onnx:
        export_onnx(model.cpu(), cfg.onnx)
    else:
        run(cfg, model, device)


if __name__ == "__main__":
    launch(main, VideoError, ImportError)
