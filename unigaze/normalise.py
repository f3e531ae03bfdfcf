"""
From a photograph to the crop that the model sees, and back (Zhang et al. 2018): numpy in float64, no OpenCV.

A virtual camera is turned until it looks straight at the face with the head upright, and moved to a fixed distance.
Between the two cameras lies the homography W = K_n S R K^-1. Directions turn by R only: S changes how far the face is,
not where it looks.

    head_rotation, t = head_pose(points, FACE_MODEL, K)    # six landmarks -> the head in the camera, in mm
    centre = face_centre(FACE_MODEL, head_rotation, t)
    R, W = normalisation(K, head_rotation, centre)
    crop = warp(image, W)                                  # (224, 224, 3), what UniGaze was trained on
    arrow(gaze, R, centre, K)                              # a prediction for the crop -> a line in the photograph

Axes are a camera's: x right, y down, z away. Angles are (pitch, yaw) in radians, with the published signs: the label of
someone who sees along g is the pitch and yaw of -g, so pitch > 0 looks up and yaw > 0 to the left of the picture.

Dimension key: N points, P starts of a search, H/W source size, S side of the crop.
"""
from pathlib import Path

import numpy as np

from lib.text import read_json

FOCAL = 960.0            # of the virtual camera, in pixels
DISTANCE = 600.0         # of the face in front of it, in mm
SIZE = 224               # side of its picture, in pixels
ARROW_LENGTH = 168.0     # mm
MAX_SOURCE = 2 ** 30     # of the position of a source pixel, in 1/32 pixel: beyond every picture

# Outer and inner corner of the eye on the left of the picture, inner and outer corner of the other, nostrils left and
# right: points 33, 133, 362, 263, 98, 327 of MediaPipe's canonical face (Apache-2.0) in cm, x right, y down, z away.
CANONICAL = np.array([
    [-4.445859, -2.663991, -3.173422],
    [-1.856432, -2.585245, -3.757904],
    [1.856432, -2.585245, -3.757904],
    [4.445859, -2.663991, -3.173422],
    [-1.405627, 1.714196, -5.241087],
    [1.405627, 1.714196, -5.241087],
])
HEAD_TURN = np.radians([-13.0, 4.2, -1.4])   # measured: between its axes and those of the published head poses

SIX_OF_50 = [20, 23, 26, 29, 15, 19]         # the same six points in the published 50-point model
SIX_OF_68 = [36, 39, 42, 45, 31, 35]         # and among the usual 68 landmarks
FIFTY_OF_68 = [8, *range(17, 60), 61, 62, 63, 65, 66, 67]   # the 50-point model among the 68


# ----------------------------------------------------------------------------------------------------------------------
# angles and matrices


def to_vector(angles):
    """(..., 2) pitch, yaw -> (..., 3) unit vector."""
    angles = np.asarray(angles, dtype=np.float64)
    pitch, yaw = np.moveaxis(angles, -1, 0)
    level = np.cos(pitch)
    x = level * np.sin(yaw)
    y = np.sin(pitch)
    z = level * np.cos(yaw)
    return np.stack([x, y, z], axis=-1)


def to_pitchyaw(vector):
    """(..., 3), any length above 0 -> (..., 2) pitch, yaw."""
    vector = np.asarray(vector, dtype=np.float64)
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    unit = vector / length
    x, y, z = np.moveaxis(unit, -1, 0)
    y = y.clip(-1, 1)
    pitch = np.arcsin(y)
    yaw = np.arctan2(x, z)
    return np.stack([pitch, yaw], axis=-1)


def rotation_matrix(vector):
    """(..., 3) axis times angle -> (..., 3, 3), by Rodrigues' formula."""
    vector = np.asarray(vector, dtype=np.float64)
    angle = np.linalg.norm(vector, axis=-1, keepdims=True)
    axis = vector / angle.clip(1e-300)

    # cross @ v is the cross product of axis and v
    unit = np.eye(3)
    cross = np.cross(axis[..., None, :], unit)
    cross = -cross

    angle = angle[..., None]
    sin = np.sin(angle)
    cos = np.cos(angle)
    return unit + sin * cross + (1 - cos) * cross @ cross


def camera_matrix(fx, fy, cx, cy):
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float64)


def project(points, K):
    """(..., 3) in the camera -> (..., 2) pixels."""
    K = np.asarray(K)
    homogeneous = points @ K.T
    depth = homogeneous[..., 2:]
    return homogeneous[..., :2] / depth


FACE_MODEL = 10 * CANONICAL @ rotation_matrix(HEAD_TURN)   # (6, 3) mm


def load_face_model(path):
    """(6, 3) mm from a file: the published face_model.txt (50 rows of x y z), six such rows, or either as JSON (a list,
    or under the key model_50_mm). Raises FileNotFoundError, ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"face_model={path}: no such file")
    try:
        if path.suffix == ".json":
            points = read_json(path)
            if isinstance(points, dict):
                points = points.get("model_50_mm")
            points = np.array(points, dtype=np.float64)
        else:
            points = np.loadtxt(path, dtype=np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"face_model={path}: not rows of x y z in mm ({error})") from error

    if points.shape == (50, 3):
        points = points[SIX_OF_50]
    if points.shape != (6, 3):
        raise ValueError(f"face_model={path}: {points.shape}, but 50 or 6 rows of x y z are expected")
    if not np.isfinite(points).all():
        raise ValueError(f"face_model={path} holds values that are not finite")
    return points


# ----------------------------------------------------------------------------------------------------------------------
# head pose


def head_pose(points, model, K, steps=50):
    """Rotation (3, 3) and translation (3,) mm that bring model (N, 3) onto landmarks `points` (N, 2) pixels: least
    squares in pixels by Levenberg-Marquardt, from P starts at once, the best of which counts."""
    points = np.asarray(points, dtype=np.float64)
    K = np.asarray(K, dtype=np.float64)
    R = starting_rotations()                                           # (P, 3, 3)
    t = starting_translation(points, model, K)
    t = t - R @ model.mean(axis=0)                                     # (P, 3)
    damping = np.full(len(R), 1e-3)
    error, J = linearise(R, t, model, points, K)
    cost = np.square(error).sum(axis=1)                                # (P,)

    for _ in range(steps):
        # a step of Gauss and Newton, shortened by the damping
        J_t = J.swapaxes(1, 2)
        A = J_t @ J                                                    # (P, 6, 6)
        b = J_t @ error[:, :, None]
        diagonal = A.diagonal(axis1=1, axis2=2) + 1e-12
        diagonal = damping[:, None] * diagonal
        A = A + diagonal[:, None] * np.eye(6)
        step = -np.linalg.solve(A, b).squeeze(2)                       # (P, 6)

        turn = rotation_matrix(step[:, :3])
        new_R = turn @ R
        new_t = t + step[:, 3:]
        new_error, new_J = linearise(new_R, new_t, model, points, K)
        new_cost = np.square(new_error).sum(axis=1)

        # keep what became better; elsewhere a more cautious step next time
        better = new_cost < cost
        R[better] = new_R[better]
        t[better] = new_t[better]
        J[better] = new_J[better]
        error[better] = new_error[better]
        cost[better] = new_cost[better]
        damping = np.where(better, damping / 5, damping * 4)
        damping = damping.clip(1e-12, 1e8)

    # six points lie almost in a plane, so two poses can explain them equally well: people face the camera
    limit = 2 * cost.min() + 1e-12
    is_likely = cost <= limit
    facing = R[:, 2, 2]
    most = facing[is_likely].max()
    is_likely &= facing > most - 0.1
    cost[~is_likely] = np.inf
    best = cost.argmin()
    return R[best], t[best]


def starting_rotations():
    """(P, 3, 3): heads to the left and right, up and down, also lying and upside down."""
    rotations = []
    for pitch in (-0.5, 0.5):
        for yaw in (-0.7, 0, 0.7):
            for roll in (-1.6, 0, 1.6, 3.1):
                turned = rotation_matrix([0, yaw, roll]) @ rotation_matrix([pitch, 0, 0])
                rotations.append(turned)
    return np.stack(rotations)


def starting_translation(points, model, K):
    """(3,) mm: the distance from the spread of the landmarks, the direction from their mean."""
    middle = points.mean(axis=0)
    size = np.linalg.norm(points - middle)
    model_size = np.linalg.norm(model - model.mean(axis=0))
    distance = K[0, 0] * model_size / size
    ray = np.linalg.inv(K) @ [*middle, 1]
    return distance * ray


def linearise(R, t, model, points, K):
    """(errors (P, 2N): how far from the landmarks the model falls, in pixels; their derivatives (P, 2N, 6) by a turn w
    of the head, R <- exp(w) R, and by its translation). K without skew."""
    turned = model @ R.swapaxes(1, 2)
    p = turned + t[:, None]                                            # (P, N, 3)
    error = project(p, K) - points
    is_behind = (p[..., 2] <= 1).any(axis=1)
    error[is_behind] = 1e9

    # pixels by coordinates in the camera
    focal = K.diagonal()[:2]
    slope = focal / p[..., 2:]                                         # (P, N, 2)
    by_point = np.zeros((*p.shape[:2], 2, 3))
    by_point[..., 0, 0] = slope[..., 0]
    by_point[..., 1, 1] = slope[..., 1]
    by_point[..., 2] = -slope * p[..., :2] / p[..., 2:]

    # turning by w moves q by w x q, and d · (w x q) = w · (q x d)
    by_turn = np.cross(turned[..., None, :], by_point)
    J = np.concatenate([by_turn, by_point], axis=-1)
    n = len(p)
    return error.reshape(n, -1), J.reshape(n, -1, 6)


def face_centre(model, R, t):
    """(3,) mm: halfway between the mean of the four eye corners and the mean of the two nose points of `model`."""
    points = model @ R.T + t
    eyes = points[:4].mean(axis=0)
    nose = points[4:6].mean(axis=0)
    return (eyes + nose) / 2


# ----------------------------------------------------------------------------------------------------------------------
# the virtual camera


def normalisation(K, head_rotation, centre, focal=FOCAL, distance=DISTANCE, size=SIZE):
    """Rotation (3, 3) into the virtual camera and homography (3, 3) from source pixels to pixels of the crop.

    K (3, 3) of the source, head_rotation (3, 3) and centre (3,) mm of the face in its camera. Published focal and
    distance: 960 and 600 for 224 pixels; 960, 300 for 448 gives the same view at twice the size.
    """
    # the virtual camera looks at the face and holds the head's x axis level
    true_distance = np.linalg.norm(centre)
    z = centre / true_distance
    down = np.cross(z, head_rotation[:, 0])
    down = down / np.linalg.norm(down)
    right = np.cross(down, z)
    right = right / np.linalg.norm(right)
    R = np.stack([right, down, z])

    # from pixels to directions, turned, moved to the fixed distance, to pixels of the virtual camera
    S = np.diag([1, 1, distance / true_distance])
    middle = size / 2
    K_n = camera_matrix(focal, focal, middle, middle)
    W = K_n @ S @ R @ np.linalg.inv(K)
    return R, W


def warp(image, W, size=SIZE):
    """(H, W, C) uint8 through a homography -> (size, size, C) uint8: bilinear, black outside. Source positions are
    rounded to 1/32 pixel as OpenCV's warpPerspective does, so the bytes are the same."""
    # source of every pixel of the crop, in 1/32 pixel
    y, x = np.indices((size, size))
    target = np.stack([x, y], axis=-1)
    ones = np.ones((size, size, 1))
    target = np.concatenate([target, ones], axis=-1)                   # (S, S, 3)
    source = 32 * project(target, np.linalg.inv(W))
    source = np.rint(source).clip(-MAX_SOURCE, MAX_SOURCE)
    x, y = np.moveaxis(source.astype(np.int64), -1, 0)

    # the four pixels around it, and the weight of the right and of the lower ones
    left = x // 32
    top = y // 32
    right_weight = x % 32
    lower_weight = y % 32
    total = weighted(image, top, left, (32 - lower_weight) * (32 - right_weight))
    total += weighted(image, top, left + 1, (32 - lower_weight) * right_weight)
    total += weighted(image, top + 1, left, lower_weight * (32 - right_weight))
    total += weighted(image, top + 1, left + 1, lower_weight * right_weight)
    rounded = (total + 512) // 1024
    return rounded.astype(np.uint8)


def weighted(image, row, column, weight):
    """Pixels (S, S, C) of image at row, column (S, S), times weight (S, S); outside of the image 0."""
    last_row = image.shape[0] - 1
    last_column = image.shape[1] - 1
    inside_row = row.clip(0, last_row)
    inside_column = column.clip(0, last_column)
    is_inside = (row == inside_row) & (column == inside_column)
    weight = weight * is_inside
    pixels = image[inside_row, inside_column]
    return pixels * weight[..., None]


def gaze_label(R, centre, target):
    """(2,) pitch, yaw of a face at `centre` that looks at `target`, both (3,) mm in the source camera."""
    sight = R @ (np.asarray(target) - centre)
    return to_pitchyaw(-sight)


def head_label(R, head_rotation):
    """(2,) pitch, yaw of the head's z axis (out of its back) in the virtual camera."""
    turned = R @ head_rotation
    return to_pitchyaw(turned[:, 2])


def to_camera(gaze, R):
    """(..., 2) pitch, yaw in the virtual camera -> (..., 3) vector in the source camera, still minus the sight."""
    return to_vector(gaze) @ R                         # R is a rotation: its inverse is its transpose


def arrow(gaze, R, centre, K, length=ARROW_LENGTH):
    """(2, 2) pixels: where the arrow of a prediction (pitch, yaw) starts and ends in the source picture."""
    end = centre - length * to_camera(gaze, R)
    ends = np.stack([centre, end])
    return project(ends, K)


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
    new = np.arange(m)[:, None]
    old = np.arange(n)
    start = new * scale                                                # of each new pixel, in old ones
    if m <= n:
        first = np.maximum(start, old)
        last = np.minimum(start + scale, old + 1)
        covered = last - first
        covered[covered < 1e-3] = 0
        whole = np.minimum(scale, n - start)
        weights = covered / whole
        return weights.astype(np.float32)

    # enlarging; in float32, as OpenCV rounds it
    left = np.floor(start)
    right = np.minimum(left + 1, n - 1)
    share = new + 1 - (left + 1) / scale
    share = share.astype(np.float32)
    share = np.where(share <= 0, 0, share % 1)
    weights = (old == left) * (1 - share)
    weights += (old == right) * share
    return weights.astype(np.float32)


def resize(image, size):
    """(H, W, 3) uint8 -> (size, size, 3) uint8 as the published readers do: float32 means, then truncated, not rounded.
    A crop that has the size already stays as it is; size None: every crop."""
    if size is None or image.shape[:2] == (size, size):
        return image
    rows = area_weights(image.shape[0], size)
    columns = area_weights(image.shape[1], size)

    # columns first, as OpenCV: truncation shows the order
    small = np.einsum("hwc,xw->hxc", image.astype(np.float32), columns)
    small = np.einsum("yh,hxc->yxc", rows, small)
    return small.clip(0, 255).astype(np.uint8)
