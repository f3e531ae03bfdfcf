"""
Rendered toy faces in the published .h5 layouts, so that everything runs without a download.

    python -m unigaze.make_data --out=data/toy_unigaze               # two sets, about half a minute on one core
    python -m unigaze.data check data/toy_unigaze toy       # what is there, and a picture

A face is an ellipsoid with hair, brows, nose, mouth and two eyeballs, cast ray by ray, so that head pose, gaze, lids
and light are one geometry and labels are exact. It is seen as a normalised crop is: upright, at one distance.
The two sets differ as real ones do, and a model that learnt one fails on the other unless it knows faces:
    toy_xgaze   subject0000.h5 ...   XGaze's layout. A studio: all head poses, hard light, sharp, true colours.
    toy_mpii    p00.h5 ...           MPIIFaceGaze's layout. Laptops: frontal heads, soft and dim light, blur, a tint,
                                     busy backgrounds, lids that hang lower.

Dimension key: N faces, S side of the crop, P rays = (2 S)^2.
"""

if not __package__:
    raise SystemExit("run it from the root of the repository as a module: python -m unigaze.make_data")

import math
import multiprocessing
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from lib import configurator
from lib.checkpoint import take_data_folder
from lib.run import launch
from unigaze.convert import write_h5
from unigaze.normalise import to_pitchyaw, to_vector


@dataclass
class Config:
    out: str = "data/toy_unigaze"  # a folder; toy_xgaze and toy_mpii are made in it
    size: int = 48                 # side of a crop in pixels; the published files have 224
    n_xgaze: int = 24              # subjects of toy_xgaze: the last quarter is for testing
    n_mpii: int = 16               # subjects of toy_mpii: the first half is for pre-training without labels
    n_faces: int = 108             # per subject; a multiple of 18, XGaze's cameras
    seed: int = 0
    n_workers: int = 2             # processes

    def check(self):
        configurator.check_at_least(self, size=16, n_xgaze=4, n_mpii=2, n_faces=18, seed=0, n_workers=1)
        if self.n_faces % 18:
            raise ValueError(f"n_faces={self.n_faces} must be a multiple of 18: a frame of XGaze has 18 cameras")


ZOOM = 1.1  # half the side of a crop, in half widths of a head: eyes lie where published crops have them


@dataclass
class Style:
    """What a set looks like: the range of everything that is drawn per subject or per face."""
    layout: str                 # of the files: xgaze or mpii
    head: tuple                 # largest pitch and yaw of heads, radians
    eye: tuple                  # largest pitch and yaw of eyes in the head, radians
    ambient: tuple              # share of the light that comes from everywhere
    exposure: tuple             # factor of all colours
    blur: tuple                 # standard deviation in pixels of a 48-pixel crop
    noise: float                # of the sensor, in grey levels
    tint: tuple                 # factor of red, green and blue
    tint_spread: float          # how much it varies between faces
    busy: float                 # contrast of the background
    skin: tuple                 # from dark to light
    lids: tuple                 # how far they are open


STYLES = {
    "toy_xgaze": Style(
        layout="xgaze", head=(0.45, 0.80), eye=(0.30, 0.40),
        ambient=(0.25, 0.45), exposure=(0.9, 1.1), blur=(0.0, 0.4), noise=2.0,
        tint=(1.0, 1.0, 1.0), tint_spread=0.03, busy=0.05,
        skin=(0.45, 1.0), lids=(0.75, 1.0)),
    "toy_mpii": Style(
        layout="mpii", head=(0.25, 0.40), eye=(0.25, 0.35),
        ambient=(0.5, 0.75), exposure=(0.6, 1.0), blur=(0.4, 0.9), noise=4.0,
        tint=(1.08, 0.98, 0.80), tint_spread=0.10, busy=0.5,
        skin=(0.3, 0.9), lids=(0.55, 0.85)),
}
HAIR = np.array([[30, 24, 20], [92, 58, 34], [176, 136, 76], [120, 118, 116]])
IRIS = np.array([[54, 34, 20], [60, 92, 120], [70, 96, 60]])


def rotation(angles):
    """(N, 2) pitch, yaw of a head's z axis (out of its back) -> (N, 3, 3) with its x, y and z axes as columns, in a
    camera with x right, y down, z away; no roll, as after normalisation."""
    yaw = angles[:, 1]
    z = to_vector(angles)
    x = np.zeros_like(z)
    x[:, 0] = np.cos(yaw)
    x[:, 2] = -np.sin(yaw)
    y = np.cross(z, x)
    return np.stack([x, y, z], axis=2)


# ----------------------------------------------------------------------------------------------------------------------
# what is drawn at random


def draw_subject(rng, style):
    """Shape and colours of one person; lengths in half widths of the head."""
    skin = np.array([224, 172, 138]) * rng.uniform(*style.skin)
    skin = skin + rng.normal(0, 6, 3)

    # FORK: more kinds of people are more draws here and a line where they are painted
    return {
        "axes": np.array([1.0, rng.uniform(1.22, 1.42), rng.uniform(1.0, 1.15)]),
        "skin": skin.clip(30, 250),
        "hair": HAIR[rng.integers(len(HAIR))],
        "hairline": rng.uniform(-0.85, -0.6),
        "lips": skin * [0.85, 0.55, 0.55],
        "iris": IRIS[rng.integers(len(IRIS))],
        "eye_x": rng.uniform(0.36, 0.44),
        "eye_y": rng.uniform(-0.22, -0.10),
        "eye_width": rng.uniform(0.24, 0.29),
        "eye_radius": rng.uniform(0.27, 0.31),
        "iris_angle": rng.uniform(0.44, 0.52),
        "brow": rng.uniform(0.05, 0.09),
        "nose": rng.uniform(0.85, 1.15),
        "mouth_y": rng.uniform(0.62, 0.74),
        "mouth_width": rng.uniform(0.26, 0.38),
        "beard": rng.uniform(0.4, 0.8) if rng.random() < 0.25 else 1.0,
    }


def draw_views(rng, style, n):
    """Head pose, gaze and light of n faces."""
    head = rng.uniform(-1, 1, (n, 2)) * style.head
    eye = rng.uniform(-1, 1, (n, 2)) * style.eye
    rotations = rotation(head)                                 # (N, 3, 3)

    # minus the direction of sight, in the head and in the camera
    in_head = to_vector(eye)
    in_camera = np.einsum("nij,nj->ni", rotations, in_head)

    # light from the front, more often from above
    light = rng.normal(0, 1, (n, 3)) * [0.8, 0.5, 0.2]
    light = light + [0, -0.5, -1]
    return {
        "head": head,
        "gaze": to_pitchyaw(in_camera),
        "rotations": rotations,
        "sight": -in_head,
        "light": light / np.linalg.norm(light, axis=1, keepdims=True),
        "ambient": rng.uniform(*style.ambient, n),
        "exposure": rng.uniform(*style.exposure, n),
        "tint": style.tint + rng.normal(0, style.tint_spread, (n, 3)),
        "opening": rng.uniform(*style.lids, n),
        "blur": rng.uniform(*style.blur, n),
        "background": rng.uniform(20, 220, (n, 2, 3)),
    }


# ----------------------------------------------------------------------------------------------------------------------
# rendering


def hit_ellipsoid(origin, direction, centre, axes):
    """Where rays meet an ellipsoid first. origin (P, 3), direction (3,) -> distance (P,), inf where they miss, and the
    unit normals (P, 3) there, all in the head's frame."""
    # scaled so that the ellipsoid is the unit sphere: |o + t d| = 1
    o = (origin - centre) / axes
    d = direction / axes
    a = d @ d
    b = o @ d
    c = (o * o).sum(axis=1) - 1
    root = b * b - a * c
    is_hit = root > 0
    root = np.sqrt(root.clip(0))
    t = (-b - root) / a

    # the normal is the gradient there
    reached = np.where(is_hit, t, 0)
    point = o + reached[:, None] * d
    normal = point / axes
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    distance = np.where(is_hit, t, np.inf)
    return distance, normal / length.clip(1e-9)


def paint_head(p, person):
    """Colour (P, 3) of the head's surface at points p (P, 3): skin, beard, hair, brows, lips."""
    x, y, z = p.T
    is_front = z < 0
    color = np.repeat(person["skin"][None], len(p), axis=0)

    # beard
    chin = person["mouth_y"] - 0.22
    is_chin = (y > chin) & (z < 0.2)
    color[is_chin] *= person["beard"]

    # hair, above a curved line and behind
    hairline = person["hairline"] + 0.25 * x * x
    is_hair = (y < hairline) | (z > 0.25)
    color[is_hair] = person["hair"]

    # brows, curved above the middle of each eye
    beside = abs(x) - person["eye_x"]
    brow_y = person["eye_y"] - 0.30 + 0.6 * beside ** 2
    is_brow = is_front & (abs(beside) < 0.24)
    is_brow &= abs(y - brow_y) < person["brow"]
    color[is_brow] = 0.7 * person["hair"] + 0.3 * color[is_brow]

    # lips
    u = x / person["mouth_width"]
    v = (y - person["mouth_y"]) / 0.09
    is_lips = is_front & (u * u + v * v < 1)
    color[is_lips] = person["lips"]
    return color


def paint_eye(p, side, person, opening, sight, direction):
    """One eye, where its lids are open: which points p (P, 3) of the head show it (P,), their colour and normal.
    side: -1 for the eye on the left of the picture, 1 for the other."""
    x, y, z = p.T
    _, height, depth = person["axes"]
    eye_x = person["eye_x"]
    eye_y = person["eye_y"]
    width = person["eye_width"]
    radius = person["eye_radius"]

    # the slit between the lids is an ellipse
    u = (x - side * eye_x) / width
    v = (y - eye_y) / (0.62 * width * opening)
    is_open = (u * u + v * v < 1) & (z < 0)

    # the eyeball lies just behind the surface of the head
    front = depth * math.sqrt(1 - eye_x ** 2 - (eye_y / height) ** 2)
    centre = np.array([side * eye_x, eye_y, 0.92 * radius - front])
    t, normal = hit_ellipsoid(p[is_open], direction, centre, radius)

    # white, iris and pupil by the angle to the line of sight, and the shadow of the upper lid
    angle = np.arccos((normal @ sight).clip(-1, 1))
    color = np.repeat([[228.0, 224.0, 220.0]], len(angle), axis=0)
    color[angle < person["iris_angle"]] = person["iris"]
    color[angle < 0.42 * person["iris_angle"]] = [12, 10, 10]
    color[v[is_open] < -0.55] *= 0.6
    color[~np.isfinite(t)] = 0.5 * person["skin"]
    return is_open, color, normal


def render(person, views, i, style, rng, size):
    """One face, (S, S, 3) uint8 RGB. Twice the resolution, averaged; rays are parallel."""
    turn = views["rotations"][i]
    depth = person["axes"][2]

    # one ray per pixel; between eyes and nose is the middle of a crop
    grid = ZOOM * ((np.arange(2 * size) + 0.5) / size - 1)
    y, x = np.meshgrid(grid, grid, indexing="ij")
    middle_x, middle_y, _ = turn @ [0, 0.12, -0.9 * depth]
    start = np.full_like(x, -5)
    origin = np.stack([x + middle_x, y + middle_y, start], axis=-1)
    origin = origin.reshape(-1, 3) @ turn                      # (P, 3) in the head's frame
    direction = turn[2]

    # background: two colours, plain or in bars
    slope_x = rng.uniform(1, 9)
    slope_y = rng.uniform(-6, 6)
    waves = np.sin(x * slope_x + y * slope_y)
    share = 0.5 + 0.5 * style.busy * waves + 0.1 * y
    share = share.reshape(-1, 1)
    first, second = views["background"][i]
    color = first + share * (second - first)
    color = color.clip(0, 255)

    # the head
    far, normal = hit_ellipsoid(origin, direction, np.zeros(3), person["axes"])
    is_head = np.isfinite(far)
    distance = np.where(is_head, far, 0)
    p = origin + distance[:, None] * direction
    color[is_head] = paint_head(p[is_head], person)

    # the eyes
    opening = views["opening"][i]
    sight = views["sight"][i]
    for side in (-1, 1):
        is_open, eye, eye_normal = paint_eye(p, side, person, opening, sight, direction)
        is_seen = is_head[is_open]
        is_open &= is_head
        color[is_open] = eye[is_seen]
        normal[is_open] = 0.5 * normal[is_open] + 0.5 * eye_normal[is_seen]

    # the nose, where it is in front
    tip = np.array([0, 0.22, -depth])
    axes = person["nose"] * np.array([0.13, 0.30, 0.22])
    near, nose_normal = hit_ellipsoid(origin, direction, tip, axes)
    is_nose = near < far
    color[is_nose] = person["skin"]
    normal[is_nose] = nose_normal[is_nose]

    # light and its colour, blur, sensor
    light = turn.T @ views["light"][i]
    ambient = views["ambient"][i]
    facing = (normal @ light).clip(0)
    shade = ambient + (1 - ambient) * facing
    is_background = ~(is_head | is_nose)
    shade[is_background] = 1
    color = color * shade[:, None] * views["exposure"][i] * views["tint"][i]
    image = color.reshape(size, 2, size, 2, 3)
    image = image.mean(axis=(1, 3))
    image = blur(image, views["blur"][i] * size / 48)
    image = image + rng.normal(0, style.noise, image.shape)
    image = image.round().clip(0, 255)
    return image.astype(np.uint8)


def blur(image, sigma):
    """Gaussian, along one axis after the other; sigma in pixels."""
    if sigma < 0.1:
        return image
    reach = math.ceil(3 * sigma)
    distance = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (distance / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for axis in (0, 1):
        border = [(0, 0)] * 3
        border[axis] = (reach, reach)
        padded = np.pad(image, border, mode="edge")
        windows = sliding_window_view(padded, len(kernel), axis=axis)
        image = windows @ kernel
    return image


# ----------------------------------------------------------------------------------------------------------------------
# files


def write_subject(job):
    """One subject's file. Its faces depend on the set, the seed and the subject's number only."""
    path, name, number, cfg = job
    if path.exists():
        return
    style = STYLES[name]
    number_of_set = list(STYLES).index(name)
    rng = np.random.default_rng([cfg.seed, number_of_set, number])
    person = draw_subject(rng, style)
    views = draw_views(rng, style, cfg.n_faces)
    faces = []
    for i in range(cfg.n_faces):
        face = render(person, views, i, style, rng, cfg.size)
        faces.append(face)

    faces = np.stack(faces)
    columns = {
        "face_patch": faces[..., ::-1],                        # BGR on disk, as published
        "face_gaze": views["gaze"].astype(np.float32),
        "face_head_pose": views["head"].astype(np.float32),
    }
    if style.layout == "xgaze":
        rows = np.arange(cfg.n_faces)
        columns["frame_index"] = rows // 18
        columns["cam_index"] = rows % 18 + 1
    write_h5(path, columns)


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    settings = asdict(cfg)
    for key in ("out", "n_workers"):
        del settings[key]
    take_data_folder(cfg.out, settings)
    root = Path(cfg.out)
    jobs = []
    for i in range(cfg.n_xgaze):
        path = root / "toy_xgaze" / f"subject{i:04d}.h5"
        jobs.append((path, "toy_xgaze", i, cfg))
    for i in range(cfg.n_mpii):
        path = root / "toy_mpii" / f"p{i:02d}.h5"
        jobs.append((path, "toy_mpii", i, cfg))

    context = multiprocessing.get_context("spawn")             # the same on every system
    with context.Pool(cfg.n_workers) as pool:
        for _ in tqdm(pool.imap_unordered(write_subject, jobs), total=len(jobs), desc="rendering subjects"):
            pass
    print(f"{cfg.out}: {len(jobs)} subjects, {cfg.n_faces} faces each, {cfg.size} pixels")


if __name__ == "__main__":
    launch(main)
