"""A memory of contexts seen in training and the tokens that followed them, searched with FAISS.

k neighbours, C width, N queries. kNN-LM (arXiv 1911.00172), section 2.
"""

import numpy as np
import torch

FLAT = 20_000  # entries up to which all are compared; above, those of the nearest PROBES lists
PROBES = 8
SPARE = 16  # neighbours asked for beyond k, for those of the query's own document


def _faiss():
    try:
        import faiss
    except ImportError as e:
        raise ImportError("the vector store needs faiss\ntry: pip install faiss-cpu") from e
    return faiss


class VectorStore:
    """At most max_vectors entries (key of length 1, next token, document); the oldest make room. Filled, then built.

    `add` then raises RuntimeError: what is evaluated is never written to.
    """

    def __init__(self, d_model, top_k, max_vectors):
        self.top_k, self.index, self.count = top_k, None, 0
        self._keys = np.zeros((max_vectors, d_model), np.float32)
        self.tokens, self.documents = np.zeros(max_vectors, np.int64), np.zeros(max_vectors, np.int64)

    def __len__(self):
        return min(self.count, len(self.tokens))

    def add(self, keys, tokens, documents):
        """keys (N, C), tokens (N), documents (N): numpy arrays or CPU tensors."""
        if self.index is not None:
            raise RuntimeError("the store is built: it is filled before training only")
        place = (self.count + np.arange(len(tokens))) % len(self.tokens)
        last = slice(-len(self.tokens), None)  # of one place written twice numpy keeps no promised one
        for ours, new in ((self._keys, keys), (self.tokens, tokens), (self.documents, documents)):
            ours[place[last]] = np.asarray(new)[last]
        self.count += len(tokens)

    def build(self):
        """End the filling: index what is there."""
        faiss, n, C = _faiss(), len(self), self._keys.shape[1]
        self.index, keys = faiss.IndexFlatIP(C), self._keys[:n]
        if n > FLAT:
            lists = int(4 * n**0.5)
            self.index = faiss.IndexIVFFlat(self.index, C, lists, faiss.METRIC_INNER_PRODUCT)
            self.index.cp.seed, self.index.nprobe = 42, PROBES
            self.index.train(keys)
        self.index.add(keys)
        self.tokens, self.documents, self._keys = self.tokens[:n], self.documents[:n], None

    @torch.compiler.disable  # FAISS and numpy are no part of a graph
    def search(self, keys, documents=None):
        """keys: (N, C) on any device, documents: (N) of the queries -> similarity (N, k), tokens (N, k).

        Similarity is the cosine, -inf where there is no entry that is not of the query's own document.
        """
        similarity, entry = self.index.search(keys.detach().float().cpu().contiguous().numpy(), self.top_k + SPARE)
        bad = entry < 0  # faiss fills up with -1
        if len(self):
            if documents is not None:
                bad |= self.documents[entry] == documents.cpu().numpy()[:, None]
            tokens = self.tokens[entry]
        else:
            tokens = np.zeros_like(entry)
        similarity[bad] = -np.inf
        order = np.argsort(bad, 1, kind="stable")[:, : self.top_k]  # the good ones stay sorted
        found = (torch.from_numpy(np.take_along_axis(a, order, 1)) for a in (similarity, tokens))
        return tuple(t.to(keys.device) for t in found)

    def arrays(self):
        """What a file needs to hold: {name: array}."""
        index = _faiss().serialize_index(self.index)
        return dict(index=index, tokens=self.tokens, documents=self.documents, top_k=np.int64(self.top_k))

    @classmethod
    def from_arrays(cls, arrays):
        """Rebuild a store from what `arrays` gave. Trust the file first (its hash): faiss does not check its bytes."""
        faiss, store = _faiss(), cls.__new__(cls)
        store.index, store._keys, store.top_k = faiss.deserialize_index(arrays["index"]), None, int(arrays["top_k"])
        store.tokens, store.documents = arrays["tokens"], arrays["documents"]
        store.count = len(store.tokens)
        return store
