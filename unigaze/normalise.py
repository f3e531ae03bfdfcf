"""
From a photograph to the crop that the model sees, and back (Zhang et al. 2018): numpy in float64, no OpenCV.

A virtual camera is turned until it looks straight at the face with the head upright, and moved to a fixed distance.
Between the two cameras lies the homography W = K_n S R K^-1. Directions turn by R only: S changes how far the face is,
not where it looks.

    R, t = head_pose(points, FACE_MODEL, K)                # six landmarks -> the head in the camera, in mm
    centre = face_centre(FACE_MODEL, R, t)
    rotation, W = normalisation(K, R, centre)
    crop = warp(image, W)                                  # (224, 224, 3), what UniGaze was trained on
    arrow(gaze, rotation, centre, K)                       # a prediction for the crop -> a line in the photograph

Axes are a camera's: x right, y down, z away. Angles are (pitch, yaw) in radians, with the published signs: the label of
someone who sees along g is the pitch and yaw of -g, so pitch > 0 looks up and yaw > 0 to the left of the picture.

Dimension key: N points, H/W source size, S side of the crop.
"""
import json
from pathlib import Path

import numpy as np

FOCAL, DISTANCE, SIZE = 960.0, 600.0, 224    # of the virtual camera: pixels, mm, pixels; what the weights expect
ARROW_LENGTH = 168.0                         # mm

# Outer and inner corner of the eye on the left of the picture, inner and outer corner of the other, nostrils left and
# right: points 33, 133, 362, 263, 98, 327 of MediaPipe's canonical face (Apache-2.0) in cm, x right, y down, z away.
CANONICAL = np.array([
    [-4.445859, -2.663991, -3.173422],
    [-1.856432, -2.585245, -3.757904],
    [1.856432, -2.585245, -3.757904],
    [4.445859, -2.663991, -3.173422],
    [-1.405627, 1.714196, -5.241087],
    [1.405627, 1.714196, -5.241087]])
HEAD_TURN = np.radians([-13.0, 4.2, -1.4])   # measured: between its axes and those of the published head poses
SIX_OF_50 = [20, 23, 26, 29, 15, 19]         # the same points in the published 50-point model
SIX_OF_68 = [36, 39, 42, 45, 31, 35]         # and among the usual 68 landmarks
FIFTY_OF_68 = [8, *range(17, 60), 61, 62, 63, 65, 66, 67]


def load_face_model(path):
    """(6, 3) mm from a file: the published face_model.txt (50 rows of x y z), six such rows, or either as JSON, also
    under a key. Raises ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"face_model={path}: no such file")
    try:
        if path.suffix == ".json":
            points = json.loads(path.read_text())
            if isinstance(points, dict):
                points = points.get("model_50_mm") or points.get("points")
            points = np.array(points, dtype=np.float64)
        else:
            points = np.loadtxt(path, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"face_model={path}: not rows of x y z in mm ({error})") from error
    if points.shape == (50, 3):
        points = points[SIX_OF_50]
    if points.shape != (6, 3):
        raise ValueError(f"face_model={path}: {points.shape}, but 50 or 6 rows of x y z are expected")
    return points


# ----------------------------------------------------------------------------------------------------------------------
# angles

def to_vector(angles):
    """(..., 2) pitch, yaw -> (..., 3) unit vector."""
    pitch, yaw = np.moveaxis(np.asarray(angles, dtype=np.float64), -1, 0)
    return np.stack([np.cos(pitch) * np.sin(yaw), np.sin(pitch), np.cos(pitch) * np.cos(yaw)], axis=-1)


def to_pitchyaw(vector):
    """(..., 3), any length above 0 -> (..., 2) pitch, yaw."""
    v = np.asarray(vector, dtype=np.float64)
    v = v / np.linalg.norm(v, axis=-1, keepdims=True)
    return np.stack([np.arcsin(v[..., 1].clip(-1, 1)), np.arctan2(v[..., 0], v[..., 2])], axis=-1)


def rotation_matrix(vector):
    """(..., 3) axis times angle -> (..., 3, 3), Rodrigues' formula."""
    vector = np.asarray(vector, dtype=np.float64)
    angle = np.linalg.norm(vector, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(vector / np.maximum(angle[..., 0], 1e-300), -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*x.shape, 3, 3)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


FACE_MODEL = 10 * CANONICAL @ rotation_matrix(HEAD_TURN)   # (6, 3) mm


# ----------------------------------------------------------------------------------------------------------------------
# head pose

def project(points, K):
    """(..., 3) in the camera -> (..., 2) pixels."""
    p = np.asarray(points) @ np.asarray(K).T
    return p[..., :2] / p[..., 2:]


def head_pose(points, model, K, steps=50):
    """Rotation (3, 3) and translation (3,) mm that bring model (N, 3) onto landmarks `points` (N, 2) pixels: least
    squares in pixels by Levenberg-Marquardt, from several starts at once, the best of which counts."""
    points = np.asarray(points, dtype=np.float64)
    K = np.asarray(K, dtype=np.float64)
    starts = [[0, yaw, roll] for yaw in (-0.7, 0, 0.7) for roll in (-1.6, 0, 1.6, 3.1)]
    R = rotation_matrix([[pitch, 0, 0] for pitch in (-0.5, 0.5) for _ in starts])
    R = rotation_matrix(starts * 2) @ R                                            # (starts, 3, 3)

    # distance from the spread of the points, position from their mean
    spread = np.linalg.norm(model - model.mean(0)) / np.linalg.norm(points - points.mean(0))
    ray = np.linalg.inv(K) @ [*points.mean(0), 1]
    t = ray * spread * K[0, 0] - R @ model.mean(0)                                 # (starts, 3)

    def residuals(R, t):
        p = model @ R.transpose(0, 2, 1) + t[:, None]                              # (starts, N, 3)
        error = project(p, K) - points
        error[(p[..., 2] <= 1).any(axis=1)] = 1e9                                  # behind the camera
        return p, error

    damping = np.full(len(R), 1e-3)
    p, error = residuals(R, t)
    cost = (error ** 2).sum((1, 2))
    for _ in range(steps):
        # how a pixel moves when the head turns by w (R <- exp(w) R) and moves by t
        inverse = 1 / p[..., 2]
        d_point = np.zeros((*p.shape[:2], 2, 3))
        d_point[..., 0, :2] = K[0, :2] * inverse[..., None]
        d_point[..., 1, 1] = K[1, 1] * inverse
        d_point[..., 0, 2] = -(K[0, 0] * p[..., 0] + K[0, 1] * p[..., 1]) * inverse ** 2
        d_point[..., 1, 2] = -K[1, 1] * p[..., 1] * inverse ** 2
        turned = p - t[:, None]
        d_turn = np.cross(turned[..., None, :], d_point)                           # d(w x q) = w · (q x d)
        J = np.concatenate([d_turn, d_point], axis=-1).reshape(len(R), -1, 6)

        A = J.transpose(0, 2, 1) @ J
        b = (J.transpose(0, 2, 1) @ error.reshape(len(R), -1, 1))[..., 0]
        A = A + damping[:, None, None] * (np.eye(6) * (np.diagonal(A, axis1=1, axis2=2)[:, None] + 1e-12))
        step = -np.linalg.solve(A, b[..., None])[..., 0]
        R_new = rotation_matrix(step[:, :3]) @ R
        t_new = t + step[:, 3:]
        p_new, error_new = residuals(R_new, t_new)
        cost_new = (error_new ** 2).sum((1, 2))

        # keep what became better, elsewhere a more cautious step next time
        better = cost_new < cost
        R = np.where(better[:, None, None], R_new, R)
        t = np.where(better[:, None], t_new, t)
        p = np.where(better[:, None, None], p_new, p)
        error = np.where(better[:, None, None], error_new, error)
        cost = np.where(better, cost_new, cost)
        damping = np.where(better, damping / 5, damping * 4).clip(1e-12, 1e8)

    # six points lie almost in a plane, so two poses can explain them equally well: people face the camera
    likely = cost <= 2 * cost.min() + 1e-12
    facing = R[:, 2, 2]
    likely &= facing > facing[likely].max() - 0.1
    best = np.where(likely, cost, np.inf).argmin()
    return R[best], t[best]


def face_centre(model, R, t):
    """(3,) mm: halfway between the mean of the four eye corners and the mean of the two nose points of `model`."""
    points = model @ R.T + t
    return (points[:4].mean(0) + points[4:6].mean(0)) / 2


# ----------------------------------------------------------------------------------------------------------------------
# the virtual camera

def normalisation(K, head_rotation, centre, focal=FOCAL, distance=DISTANCE, size=SIZE):
    """Rotation (3, 3) into the virtual camera and homography (3, 3) from source pixels to pixels of the crop.

    K (3, 3) of the source, head_rotation (3, 3) and centre (3,) mm of the face in its camera. Published focal and
    distance: 960 and 600 for 224 pixels; 960, 300 for 448 gives the same view at twice the size.
    """
    d = np.linalg.norm(centre)
    z = centre / d                                     # the virtual camera looks at the face
    down = np.cross(z, head_rotation[:, 0])            # and holds the head's x axis level
    down = down / np.linalg.norm(down)
    right = np.cross(down, z)
    right = right / np.linalg.norm(right)
    R = np.stack([right, down, z])
    S = np.diag([1, 1, distance / d])
    K_n = np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
    return R, K_n @ S @ R @ np.linalg.inv(K)


def warp(image, W, size=SIZE):
    """(H, W, C) uint8 through a homography -> (size, size, C) uint8: bilinear, black outside. Source positions are
    rounded to 1/32 pixel as OpenCV's warpPerspective does, so the bytes are the same."""
    h, w = image.shape[:2]
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    source = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.linalg.inv(W).T
    source = np.rint(source[..., :2] / source[..., 2:] * 32).clip(-2 ** 30, 2 ** 30).astype(np.int64)
    left, top = np.moveaxis(source >> 5, -1, 0)
    part_x, part_y = np.moveaxis(source & 31, -1, 0)

    total = np.zeros((size, size, image.shape[2]), dtype=np.int64)
    for dy, weight_y in ((0, 32 - part_y), (1, part_y)):
        for dx, weight_x in ((0, 32 - part_x), (1, part_x)):
            yy, xx = top + dy, left + dx
            inside = (yy >= 0) & (yy < h) & (xx >= 0) & (xx < w)
            pixels = image[yy.clip(0, h - 1), xx.clip(0, w - 1)]
            total += pixels * (weight_y * weight_x * inside)[..., None]
    return ((total + 512) >> 10).astype(np.uint8)


def gaze_label(R, centre, target):
    """(2,) pitch, yaw of a face at `centre` that looks at `target`, both (3,) mm in the source camera."""
    return to_pitchyaw(-R @ (np.asarray(target) - centre))


def head_label(R, head_rotation):
    """(2,) pitch, yaw of the head's z axis (out of its back) in the virtual camera."""
    return to_pitchyaw((R @ head_rotation)[:, 2])


def to_camera(gaze, R):
    """(..., 2) pitch, yaw in the virtual camera -> (..., 3) vector in the source camera, still minus the sight."""
    return to_vector(gaze) @ R                         # R is a rotation: its inverse is its transpose


def arrow(gaze, R, centre, K, length=ARROW_LENGTH):
    """(2, 2) pixels: where the arrow of a prediction (pitch, yaw) starts and ends in the source picture."""
    end = centre - length * to_camera(gaze, R)
    return project(np.stack([centre, end]), K)


def arrow_on_crop(gaze, size):
    """(2,) pixels from the middle of a crop to the arrow's tip; half the crop long when it lies in the picture."""
    x, y, _ = to_vector(gaze)
    return -size / 2 * np.array([x, y])


# ----------------------------------------------------------------------------------------------------------------------
# resizing as the published readers do it

def area_weights(n, m):
    """(m, n) float32: OpenCV's INTER_AREA from n pixels to m along one axis. Each new pixel is the mean of those it
    covers; when enlarging, a blend of the two it lies between."""
    scale = 1 / (m / n)
    start = np.arange(m)[:, None] * scale                                      # of each new pixel, in old ones
    old = np.arange(n)[None]
    if m <= n:
        covered = np.minimum(start + scale, old + 1) - np.maximum(start, old)  # (m, n) overlap
        covered = np.where(covered > 1e-3, covered.clip(0, 1), 0)
        return (covered / np.minimum(scale, n - start)).astype(np.float32)
    left = np.floor(start)
    blend = (np.arange(1, m + 1)[:, None] - (left + 1) / scale).astype(np.float32)
    blend = np.where(blend <= 0, 0, blend - np.floor(blend)).astype(np.float32)
    right = np.minimum(left + 1, n - 1)
    return ((old == left) * (1 - blend) + (old == right) * blend).astype(np.float32)


def resize(image, size):
    """(H, W, 3) uint8 -> (size, size, 3) uint8 as the published readers do: float32 means, then truncated, not rounded.
    A crop that has the size already stays as it is; size None: every crop."""
    if size is None or image.shape[:2] == (size, size):
        return image
    rows = area_weights(image.shape[0], size)
    columns = area_weights(image.shape[1], size)
    small = np.einsum("hwc,xw->hxc", image.astype(np.float32), columns)        # OpenCV's order: truncation shows it
    small = np.einsum("yh,hxc->yxc", rows, small)
    return small.clip(0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# annotations of the raw sets, a row each; lengths in mm, all in the camera of the picture

def read_xgaze(line):
    """A row of XGaze's <subject>_update.csv."""
    fields = line.strip().split(",")
    numbers = np.array(fields[2:], dtype=np.float64)
    return {"image": f"{fields[0]}/{fields[1]}", "target": numbers[2:5], "head_rotation": rotation_matrix(numbers[5:8]),
            "rotation_vector": numbers[5:8], "translation": numbers[8:11],
            "landmarks": numbers[11:147].reshape(68, 2), "model_points": numbers[147:247].reshape(50, 2)}


def read_mpii(line):
    """A row of MPIIFaceGaze's pNN.txt; landmarks are four eye and two mouth corners."""
    fields = line.split()
    numbers = np.array(fields[1:27], dtype=np.float64)
    return {"image": fields[0], "screen": numbers[:2], "landmarks": numbers[2:14].reshape(6, 2),
            "head_rotation": rotation_matrix(numbers[14:17]), "rotation_vector": numbers[14:17],
            "translation": numbers[17:20], "centre": numbers[20:23], "target": numbers[23:26], "eye": fields[27]}


def read_gaze360(line):
    """A row of the face crops' label file: subject, and the direction of sight in the camera."""
    face, _, _, origin, gaze, _ = line.split()
    x, y, z = (float(v) for v in gaze.split(","))
    parts = origin.split("/")
    return {"image": face, "subject": parts[2], "img_name": "/".join(parts[1:]), "sight": np.array([-x, -y, z])}


def read_eyediap(folder, every=15):
    """A session of EYEDIAP: K (3, 3) of its VGA camera, and {frame: target (3,)} of the frames whose state is OK, that
    have a target, and whose number divides by `every`. The screen file wins over the ball's."""
    lines = Path(folder, "rgb_vga_calibration.txt").read_text().splitlines()
    (fx, _, cx), (_, fy, cy) = (map(float, line.split(";")) for line in lines[3:5])
    K = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])

    screen, ball = Path(folder, "screen_coordinates.txt"), Path(folder, "ball_tracking.txt")
    targets = read_targets(screen) if screen.exists() else read_targets(ball, ball=True)
    state = [line.split() for line in Path(folder, "gaze_state.txt").read_text().splitlines() if line.strip()]
    ok = {int(frame) for frame, name in state if name == "OK"}
    return K, {frame: target for frame, target in targets.items() if frame in ok and frame % every == 0}


def read_targets(path, ball=False):
    """{frame: (3,) mm}. The ball's were recorded by a camera that looks back from a metre away."""
    targets = {}
    for line in path.read_text().splitlines()[1:]:
        fields = line.split(";")
        target = np.array(fields[-3:], dtype=np.float64)
        if not target.any():                           # no target in this frame
            continue
        if ball:
            target = np.array([1, -1, -1]) * (target - [0, 0, 1])
        targets[int(fields[0])] = 1000 * target
    return targets
