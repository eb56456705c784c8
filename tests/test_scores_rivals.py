"""Answers without a model."""

import random

import numpy as np
from look_alikes import patients

from medtune import audit, scores


def test_caption_copier_lives_on_leaks():
    dataset = patients()
    captions = np.array(dataset["caption"])

    def share_right(splits):
        in_train = np.array([split == "train" for split in splits])
        train = dataset.select(np.flatnonzero(in_train))
        test = dataset.select(np.flatnonzero(~in_train))
        copied = scores.nearest_caption_copier(train, test)
        return np.mean(np.array(copied) == captions[~in_train])

    whole = audit.split_by_group(dataset["patient"])
    assert share_right(whole) == 0
    assert share_right(random.Random(0).sample(whole, len(whole))) > 0.9

    marks = audit.fingerprint(dataset)
    copied = scores.nearest_caption_copier(dataset, dataset, fingerprints=(marks, marks))
    assert copied == captions.tolist()


def test_most_frequent_caption_is_the_first_of_several():
    assert scores.most_frequent_caption({"caption": ["b", "a", "a", "b"]}) == "b"
