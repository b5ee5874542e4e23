"""A knowledge base over the documentation corpus: pages, their embeddings, and an inverted-file index searched in
stages.

Embeddings are latent semantic analysis (hashed TF-IDF, projected by a truncated SVD): no model to fetch, and good
enough that a question finds its page. Everything that is computed is an artefact, so all processes search the same
index.

Legend: N pages, E embedding size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core import paths
from hasten.core.artefact import ArtefactStore
from hasten.core.errors import RequestError, UnsupportedError
from hasten.lm.context.retrieval import Candidates, Clock, StagedSearch
from hasten.workloads.corpus import Document, corpus

_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
_MOST = 5  # times the least, characters of a page
_FEATURES = 2**15


@dataclass(frozen=True)
class Page:
    """A few consecutive sections of a document. headings: what can be asked about it."""

    title: str
    headings: tuple[str, ...]
    text: str


def pages(count: int, least: int = 1200) -> list[Page]:
    """The first ``count`` pages of the corpus, of ``least`` to five times as many characters (about 4 to a token).

    Raises `RequestError` when it has fewer.
    """
    every = (page for document in corpus().all_documents for page in _split(document, least))
    found = list(islice(every, max(count, 0)))
    if not found or len(found) < count:
        raise RequestError(f"the corpus has 1 to {len(found)} pages of {least} characters, not {count}")
    return found


def _split(document: Document, least: int) -> list[Page]:
    """Sections are put together until a page is long enough; what is longer than a page is cut off."""
    headings = list(_HEADING.finditer(document.text))
    title = headings[0].group(1) if headings else document.name
    out: list[Page] = []
    text, names = "", []
    for number, found in enumerate(headings):
        after = headings[number + 1].start() if number + 1 < len(headings) else None
        text += document.text[found.start() : after]
        names.append(found.group(1).strip())
        if len(text) >= least:
            out.append(Page(title, tuple(names), text[: _MOST * least].strip()))
            text, names = "", []
    return out


def libraries() -> tuple[Any, Any]:
    """(faiss, sklearn). Raises `UnsupportedError` naming what to install."""
    try:
        import faiss
        import sklearn.decomposition
        import sklearn.feature_extraction.text
    except ImportError as error:
        raise UnsupportedError(
            f"retrieval needs faiss-cpu and scikit-learn ({error}); install them with: pip install 'hasten[retrieval]'"
        ) from None
    return faiss, sklearn


class Knowledge:
    """``count`` pages of at least ``least`` characters in ``lists`` inverted lists; the index is built once and kept.

    size: of the embeddings. Raises `UnsupportedError` without faiss, `RequestError` for a corpus that is too small.
    """

    def __init__(self, count: int, lists: int, least: int = 1200, size: int = 256) -> None:
        self.faiss, _ = libraries()
        self.pages = pages(count, least)
        if not 1 <= lists <= count:
            raise RequestError(f"{count} pages cannot fill {lists} lists")
        self.size, self.lists = min(size, count), lists
        store = ArtefactStore(paths.home() / "artefacts", corpus().sha256)
        made_from = {
            "version": 1,
            "pages": count,
            "least": least,
            "lists": lists,
            "size": self.size,
            "features": _FEATURES,
        }
        folder = store.build("knowledge", made_from, self._build)
        with np.load(folder / "projection.npz", allow_pickle=False) as held:
            self._idf, self._components = held["idf"], held["components"]
        self.index = self.faiss.read_index(str(folder / "index.faiss"))

    def _build(self, folder: Path) -> None:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfTransformer

        weigh = TfidfTransformer(sublinear_tf=True)
        # Headings count for more than the text: they are what is asked about.
        texts = [3 * f"{page.title} {' '.join(page.headings)} " + page.text for page in self.pages]
        weighted = weigh.fit_transform(_counts(texts))
        project = TruncatedSVD(self.size, random_state=0)
        project.fit(weighted)
        np.savez(
            folder / "projection.npz",
            idf=weigh.idf_.astype(np.float32),
            components=project.components_.astype(np.float32),
        )
        vector_NE = _unit(weighted @ project.components_.T)
        threads = self.faiss.omp_get_max_threads()
        self.faiss.omp_set_num_threads(1)
        try:
            coarse = self.faiss.IndexFlatIP(self.size)
            index = self.faiss.IndexIVFFlat(coarse, self.size, self.lists, self.faiss.METRIC_INNER_PRODUCT)
            index.cp.min_points_per_centroid = 1  # fewer pages than faiss would like are no reason to warn
            index.train(vector_NE)
            index.add(vector_NE)
        finally:
            self.faiss.omp_set_num_threads(threads)
        self.faiss.write_index(index, str(folder / "index.faiss"))

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[len(texts), E] unit vectors; a text without a known word is all zeros."""
        from sklearn.preprocessing import normalize

        counts = _counts(texts).astype(np.float32)
        counts.data = 1 + np.log(counts.data)
        weighted = normalize(counts.multiply(self._idf).tocsr())
        return _unit(weighted @ self._components.T)

    def probe(self, vector_1E: NDArray[np.float32], count: int) -> NDArray[np.int64]:
        """The ``count`` lists nearest to a query, the nearest first."""
        _, list_1L = self.index.quantizer.search(vector_1E, min(count, self.lists))
        return np.asarray(list_1L[0])

    def search(
        self, vector_1E: NDArray[np.float32], lists: NDArray[np.int64], k: int
    ) -> list[tuple[float, int]]:
        """(similarity, page) of the ``k`` best pages in ``lists``, the best first."""
        self.index.nprobe = len(lists)
        zeros = np.zeros((1, len(lists)), dtype=np.float32)
        score_1K, page_1K = self.index.search_preassigned(vector_1E, k, lists[None].astype(np.int64), zeros)
        return [(float(s), int(p)) for s, p in zip(score_1K[0], page_1K[0], strict=True) if p >= 0]


def _counts(texts: Sequence[str]) -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(n_features=_FEATURES, alternate_sign=False, norm=None).transform(texts)


def _unit(vector_NE: Any) -> NDArray[np.float32]:
    dense: NDArray[np.float32] = np.array(vector_NE, dtype=np.float32, order="C")
    dense /= np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-12)
    return dense


class IndexSearch(StagedSearch):
    """One question: the ``probes`` nearest lists, searched in ``stages``, the nearest lists first.

    A stage's answer is there when the clock says so: ``seconds`` are spread evenly over the stages and stand for an
    index that is elsewhere or on disk (emulated: they cost no processor time); the search itself runs here, in
    `poll`.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        question: str,
        *,
        k: int,
        probes: int,
        stages: int,
        clock: Clock,
        asked_at: float,
        seconds: float = 0.0,
    ) -> None:
        self.knowledge, self.k, self.clock = knowledge, k, clock
        self.vector_1E = knowledge.embed([question])
        lists = knowledge.probe(self.vector_1E, probes)
        self.parts = [part for part in np.array_split(lists, stages) if len(part)]
        self.asked_at, self.pace = asked_at, seconds / len(self.parts)
        self.stage = 0
        self._best: list[tuple[float, int]] = []
        self._told: tuple[int, ...] = ()

    @property
    def due(self) -> float:
        """When the next stage's answer is there."""
        return self.asked_at + self.pace * (self.stage + 1)

    def poll(self) -> Candidates | None:
        while self.stage < len(self.parts) and self.clock.now() >= self.due:
            found = self.knowledge.search(self.vector_1E, self.parts[self.stage], self.k)
            self._best = sorted(self._best + found, key=lambda one: (-one[0], one[1]))[: self.k]
            self.stage += 1
        documents = tuple(page for _, page in self._best)
        final = self.stage == len(self.parts)
        if not final and documents == self._told:
            return None
        self._told = documents
        return Candidates(documents, final)
