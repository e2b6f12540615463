"""Similarity of questions by their words, numbers and commands: the cosine of tf-idf vectors."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array, diags_array

from oreal_megatron.data.curation.text import tokens

_BLOCK = 1 << 23
"""Similarities that are in memory at the same time, at most."""


def most_similar(queries: Sequence[str], texts: Sequence[str], num: int) -> list[list[tuple[int, float]]]:
    """Returns for each query the `num` most similar texts: (index, cosine in (0, 1]), the most similar first.

    Texts without a common token are left out; of equal cosines the first text comes first.
    """
    vectors = _tf_idf([*queries, *texts])
    asked, others = vectors[: len(queries)], vectors[len(queries) :].T.tocsr()
    found = []
    num_rows = max(_BLOCK // max(len(texts), 1), 1)
    for start in range(0, len(queries), num_rows):
        cosines = (asked[start : start + num_rows] @ others).tocsr()
        for row in range(cosines.shape[0]):
            part = slice(cosines.indptr[row], cosines.indptr[row + 1])
            indices, values = cosines.indices[part], cosines.data[part]
            if len(values) > num:  # without those that are less similar than the last one
                near = np.flatnonzero(values >= -np.partition(-values, num - 1)[num - 1])
                indices, values = indices[near], values[near]
            best = np.lexsort((indices, -values))[:num]
            found.append([(int(indices[i]), float(values[i])) for i in best])
    return found


def _tf_idf(texts: Sequence[str]) -> csr_array:
    """Returns a vector of length 1 for each text, fp64 [texts, tokens]: counts times inverse document frequencies.

    The inverse document frequency of a token in n of N texts is log((1 + N) / (1 + n)) + 1.
    """
    ids: dict[str, int] = {}
    found, counts, starts = array("i"), array("d"), array("q", [0])
    for text in texts:
        own = Counter(ids.setdefault(token, len(ids)) for token in tokens(text))
        found.extend(own.keys())
        counts.extend(own.values())
        starts.append(len(found))
    columns, values = np.frombuffer(found, np.int32), np.frombuffer(counts, np.float64)
    matrix = csr_array((values, columns, starts), shape=(len(texts), len(ids)))
    weights = np.log((1 + len(texts)) / (1 + np.bincount(columns, minlength=len(ids)))) + 1
    matrix = matrix @ diags_array(weights)
    lengths = np.sqrt(matrix.multiply(matrix).sum(axis=1))
    return csr_array(diags_array(1 / np.maximum(lengths, 1e-12)) @ matrix)
