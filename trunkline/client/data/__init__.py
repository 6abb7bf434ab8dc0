"""A plant's files -> windows to train on: read, clean, split, scale, cut. numpy, polars and h5py; nothing here leaves the plant."""

from trunkline.client.data.notes import Note, Problem
from trunkline.client.data.preprocess.scale import Scaler
from trunkline.client.data.site_data import SiteData, Survey, open_data, survey
from trunkline.client.data.windows import WindowSet

__all__ = ["Note", "Problem", "Scaler", "SiteData", "Survey", "WindowSet", "open_data", "survey"]
