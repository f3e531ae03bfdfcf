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
import json
from pathlib import Path

import numpy as np

FOCAL = 960.0            # of the virtual camera, in pixels
DISTANCE = 600.0         # of the face in front of it, in mm
SIZE = 224               # side of its picture, in pixels
ARROW_LENGTH = 168.0     # mm

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
    pitch = angles[..., 0]
    yaw = angles[..., 1]
    x = np.cos(pitch) * np.sin(yaw)
    y = np.sin(pitch)
    z = np.cos(pitch) * np.cos(yaw)
    return np.stack([x, y, z], axis=-1)


def to_pitchyaw(vector):
    """(..., 3), any length above 0 -> (..., 2) pitch, yaw."""
    v = np.asarray(vector, dtype=np.float64)
    v = v / np.linalg.norm(v, axis=-1, keepdims=True)
    pitch = np.arcsin(v[..., 1].clip(-1, 1))
    yaw = np.arctan2(v[..., 0], v[..., 2])
    return np.stack([pitch, yaw], axis=-1)


def rotation_matrix(vector):
    """(..., 3) axis times angle -> (..., 3, 3), by Rodrigues' formula."""
    vector = np.asarray(vector, dtype=np.float64)
    angle = np.linalg.norm(vector, axis=-1)[..., None, None]
    axis = vector / np.maximum(angle[..., 0], 1e-300)

    # the matrix that takes the cross product with the axis
    cross = np.zeros((*vector.shape[:-1], 3, 3))
    cross[..., 0, 1] = -axis[..., 2]
    cross[..., 0, 2] = axis[..., 1]
    cross[..., 1, 2] = -axis[..., 0]
    cross = cross - cross.swapaxes(-1, -2)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def camera_matrix(fx, fy, cx, cy):
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float64)


def project(points, K):
    """(..., 3) in the camera -> (..., 2) pixels."""
    p = np.asarray(points) @ np.asarray(K).T
    return p[..., :2] / p[..., 2:]


FACE_MODEL = 10 * CANONICAL @ rotation_matrix(HEAD_TURN)   # (6, 3) mm


def load_face_model(path):
    """(6, 3) mm from a file: the published face_model.txt (50 rows of x y z), six such rows, or either as JSON (a list,
    or under the key model_50_mm). Raises FileNotFoundError, ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"face_model={path}: no such file")
    try:
        if path.suffix == ".json":
            points = json.loads(path.read_text())
            if isinstance(points, dict):
                points = points.get("model_50_mm")
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
# head pose


def head_pose(points, model, K, steps=50):
    """Rotation (3, 3) and translation (3,) mm that bring model (N, 3) onto landmarks `points` (N, 2) pixels: least
    squares in pixels by Levenberg-Marquardt, from P starts at once, the best of which counts."""
    points = np.asarray(points, dtype=np.float64)
    K = np.asarray(K, dtype=np.float64)
    R = starting_rotations()                                           # (P, 3, 3)

    # distance from the spread of the points, position from their mean
    spread = np.linalg.norm(model - model.mean(axis=0)) / np.linalg.norm(points - points.mean(axis=0))
    ray = np.linalg.inv(K) @ [*points.mean(axis=0), 1]
    t = ray * spread * K[0, 0] - R @ model.mean(axis=0)                # (P, 3)

    damping = np.full(len(R), 1e-3)
    p, error = residuals(R, t, model, points, K)
    cost = (error ** 2).sum(axis=(1, 2))
    for _ in range(steps):
        J = jacobian(p, t, K)                                          # (P, 2N, 6)
        J_t = J.transpose(0, 2, 1)
        A = J_t @ J
        b = J_t @ error.reshape(len(R), -1, 1)
        diagonal = np.diagonal(A, axis1=1, axis2=2) + 1e-12
        A = A + (damping[:, None] * diagonal)[:, None] * np.eye(6)
        step = -np.linalg.solve(A, b)[..., 0]

        new_R = rotation_matrix(step[:, :3]) @ R
        new_t = t + step[:, 3:]
        new_p, new_error = residuals(new_R, new_t, model, points, K)
        new_cost = (new_error ** 2).sum(axis=(1, 2))

        # keep what became better; elsewhere a more cautious step next time
        better = new_cost < cost
        R[better] = new_R[better]
        t[better] = new_t[better]
        p[better] = new_p[better]
        error[better] = new_error[better]
        cost[better] = new_cost[better]
        damping = np.where(better, damping / 5, damping * 4).clip(1e-12, 1e8)

    # six points lie almost in a plane, so two poses can explain them equally well: people face the camera
    likely = cost <= 2 * cost.min() + 1e-12
    facing = R[:, 2, 2]
    likely &= facing > facing[likely].max() - 0.1
    best = np.where(likely, cost, np.inf).argmin()
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


def residuals(R, t, model, points, K):
    """Model points in the camera (P, N, 3), and how far from the landmarks they fall (P, N, 2) in pixels."""
    p = model @ R.transpose(0, 2, 1) + t[:, None]
    error = project(p, K) - points
    is_behind = (p[..., 2] <= 1).any(axis=1)
    error[is_behind] = 1e9
    return p, error


def jacobian(p, t, K):
    """(P, 2N, 6): how the pixels of p (P, N, 3) move when the head turns by w (R <- exp(w) R) and moves by t."""
    fx = K[0, 0]
    fy = K[1, 1]
    x, y, z = np.moveaxis(p, -1, 0)
    by_point = np.zeros((*p.shape[:2], 2, 3))                          # pixels by coordinates in the camera
    by_point[..., 0, 0] = fx / z
    by_point[..., 0, 1] = K[0, 1] / z
    by_point[..., 0, 2] = -(fx * x + K[0, 1] * y) / z ** 2
    by_point[..., 1, 1] = fy / z
    by_point[..., 1, 2] = -fy * y / z ** 2

    # turning by w moves q by w x q, and d · (w x q) = w · (q x d)
    q = p - t[:, None]
    by_turn = np.cross(q[..., None, :], by_point)
    return np.concatenate([by_turn, by_point], axis=-1).reshape(len(p), -1, 6)


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
    d = np.linalg.norm(centre)
    z = centre / d
    down = np.cross(z, head_rotation[:, 0])
    down = down / np.linalg.norm(down)
    right = np.cross(down, z)
    right = right / np.linalg.norm(right)
    R = np.stack([right, down, z])

    S = np.diag([1, 1, distance / d])
    K_n = camera_matrix(focal, focal, size / 2, size / 2)
    return R, K_n @ S @ R @ np.linalg.inv(K)


def warp(image, W, size=SIZE):
    """(H, W, C) uint8 through a homography -> (size, size, C) uint8: bilinear, black outside. Source positions are
    rounded to 1/32 pixel as OpenCV's warpPerspective does, so the bytes are the same."""
    height, width = image.shape[:2]
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    target = np.stack([x, y, np.ones_like(x)], axis=-1)                # (S, S, 3)
    source = target @ np.linalg.inv(W).T
    source = np.rint(32 * source[..., :2] / source[..., 2:])
    source = source.clip(-2 ** 30, 2 ** 30).astype(np.int64)

    # whole pixels, and the part of a pixel that goes beyond, in 1/32
    left, top = np.moveaxis(source >> 5, -1, 0)
    part_x, part_y = np.moveaxis(source & 31, -1, 0)
    total = np.zeros((size, size, image.shape[2]), dtype=np.int64)
    for dy, weight_y in ((0, 32 - part_y), (1, part_y)):
        for dx, weight_x in ((0, 32 - part_x), (1, part_x)):
            yy = top + dy
            xx = left + dx
            is_inside = (yy >= 0) & (yy < height) & (xx >= 0) & (xx < width)
            pixels = image[yy.clip(0, height - 1), xx.clip(0, width - 1)]
            weight = weight_y * weight_x * is_inside
            total += pixels * weight[..., None]
    return ((total + 512) >> 10).astype(np.uint8)


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
    new = np.arange(m)[:, None]
    old = np.arange(n)[None]
    start = new * scale                                                # of each new pixel, in old ones
    if m <= n:
        covered = np.minimum(start + scale, old + 1) - np.maximum(start, old)
        covered[covered < 1e-3] = 0
        weights = covered / np.minimum(scale, n - start)
        return weights.astype(np.float32)

    left = np.floor(start)
    right = np.minimum(left + 1, n - 1)
    blend = (new + 1 - (left + 1) / scale).astype(np.float32)            # in float32, as OpenCV rounds it
    blend = np.where(blend <= 0, 0, blend - np.floor(blend))
    weights = (old == left) * (1 - blend) + (old == right) * blend
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
