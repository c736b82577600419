"""A store of training contexts and the tokens that followed them, searched with FAISS.

k neighbours, C width, N queries. kNN-LM (arXiv 1911.00172), section 2.
"""

import numpy as np
import torch

FLAT = 20_000  # up to this many entries a query is compared with all of them
PROBES = 8  # above, only with the entries of this many nearest lists
SPARE = 16  # extra neighbours to request, since those of the query's own document are dropped


def _faiss():
    try:
        import faiss
    except ImportError as e:
        raise ImportError("the vector store needs faiss\ntry: pip install faiss-cpu") from e
    return faiss


class VectorStore:
    """At most max_vectors entries (key of length 1, next token, document); new entries replace the oldest.

    Fill the store with `add`, then call `build`. After that `add` raises RuntimeError, so that an evaluation can't
    write to the store.
    """

    def __init__(self, d_model, top_k, max_vectors):
        self.top_k = top_k
        self.index = None
        self.count = 0
        self._keys = np.zeros((max_vectors, d_model), np.float32)
        self.tokens, self.documents = np.zeros(max_vectors, np.int64), np.zeros(max_vectors, np.int64)

    def __len__(self):
        return min(self.count, len(self.tokens))

    def add(self, keys, tokens, documents):
        """keys (N, C), tokens (N), documents (N): numpy arrays or CPU tensors."""
        if self.index is not None:
            raise RuntimeError("the store is built: it is filled before training only")
        place = (self.count + np.arange(len(tokens))) % len(self.tokens)
        last = slice(-len(self.tokens), None)  # with duplicate indices numpy does not define which write wins
        for array, new in ((self._keys, keys), (self.tokens, tokens), (self.documents, documents)):
            array[place[last]] = np.asarray(new)[last]
        self.count += len(tokens)

    def build(self):
        """Index the entries; none can be added afterwards."""
        faiss = _faiss()
        n = len(self)
        C = self._keys.shape[1]
        self.index = faiss.IndexFlatIP(C)
        keys = self._keys[:n]
        if n > FLAT:
            lists = int(4 * n**0.5)
            self.index = faiss.IndexIVFFlat(self.index, C, lists, faiss.METRIC_INNER_PRODUCT)
            self.index.cp.seed, self.index.nprobe = 42, PROBES
            self.index.train(keys)
        self.index.add(keys)
        self.tokens = self.tokens[:n]
        self.documents = self.documents[:n]
        self._keys = None

    @torch.compiler.disable  # FAISS and numpy can't be part of a graph
    def search(self, keys, documents=None):
        """Find neighbours: keys (N, C) on any device, documents (N) of the queries -> similarity (N, k), tokens (N, k).

        Similarity is the cosine. It is -inf where too few entries of other documents were found.
        """
        similarity, entry = self.index.search(keys.detach().float().cpu().contiguous().numpy(), self.top_k + SPARE)
        bad = entry < 0  # faiss pads with -1
        if len(self):
            if documents is not None:
                bad |= self.documents[entry] == documents.cpu().numpy()[:, None]
            tokens = self.tokens[entry]
        else:
            tokens = np.zeros_like(entry)
        similarity[bad] = -np.inf
        order = np.argsort(bad, 1, kind="stable")[:, : self.top_k]  # good entries first, still sorted
        neighbours = (torch.from_numpy(np.take_along_axis(a, order, 1)) for a in (similarity, tokens))
        return tuple(t.to(keys.device) for t in neighbours)

    def arrays(self):
        """Return the arrays that a file stores: {name: array}."""
        index = _faiss().serialize_index(self.index)
        return dict(index=index, tokens=self.tokens, documents=self.documents, top_k=np.int64(self.top_k))

    @classmethod
    def from_arrays(cls, arrays):
        """Rebuild a store from the result of `arrays`.

        Check the hash of the file first: faiss does not validate the bytes of an index.
        """
        faiss = _faiss()
        store = cls.__new__(cls)
        store.index = faiss.deserialize_index(arrays["index"])
        store._keys = None
        store.top_k = int(arrays["top_k"])
        store.tokens, store.documents = arrays["tokens"], arrays["documents"]
        store.count = len(store.tokens)
        return store
