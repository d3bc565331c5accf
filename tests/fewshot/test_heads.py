"""Few-shot heads against cases worked by hand and against scikit-learn."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from lora_recycle.errors import ConfigError, DataError
from lora_recycle.fewshot.heads import HEADS, DiscriminantHead, PrototypeHead, laplacian, make_head
from lora_recycle.fewshot.heads.information import InformationHead
from lora_recycle.fewshot.heads.laplacian import LaplacianHead, nearest_neighbours
from lora_recycle.fewshot.heads.transport import TransportHead, sinkhorn
from lora_recycle.fewshot.heads.unrolled_em import UnrolledEMHead


NAMES = list(HEADS)
INCREMENTAL = [name for name in NAMES if "sums" in HEADS[name].statistics_shapes]


def task(ways=3, shots=4, queries=9, dim=6, seed=0, spread=0.4):
    """Noisy classes: support (N, D), labels (N,), queries (Q, D), their labels."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(ways, dim, generator=generator)
    labels = torch.arange(ways).repeat(shots)
    truth = torch.arange(ways).repeat(queries // ways)
    support = means[labels] + spread * torch.randn(len(labels), dim, generator=generator)
    return support, labels, means[truth] + spread * torch.randn(len(truth), dim, generator=generator), truth


@pytest.mark.parametrize("name", NAMES)
def test_heads_solve_an_easy_task_and_many_tasks_at_once(name):
    tasks = [task(seed=seed, spread=0.1) for seed in range(3)]
    head = make_head(name, {})
    alone = [head.classify(support, labels, 3, query) for support, labels, query, _ in tasks]
    support, labels, query, truth = (torch.stack(parts) for parts in zip(*tasks, strict=True))
    together = head.classify(support, labels, 3, query)
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-3, atol=1e-3)
    assert (together.argmax(-1) == truth).all()


@pytest.mark.parametrize("name", NAMES)
def test_parts_in_any_order_are_the_whole(name):
    support, labels, query, _ = task()
    head = make_head(name, {})
    whole = head.statistics(support, labels, 3)
    expected = head.logits(query, head.prepare(whole))
    # session s is a class and one image of class 2, which so arrives bit by bit
    shared = [rows.tolist() + [11 - 3 * s] for s, rows in enumerate([torch.arange(0, 12, 3), torch.arange(1, 12, 3)])]
    for sessions in itertools.permutations([*shared, [2, 5]]):
        assert sorted(sum(sessions, [])) == list(range(12))
        found = head.statistics(support[sessions[0]], labels[sessions[0]], 3)
        for rows in sessions[1:]:
            found = head.merged(found, head.statistics(support[rows], labels[rows], 3))
        torch.testing.assert_close(head.logits(query, head.prepare(found)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", INCREMENTAL)
def test_later_classes_append_to_the_statistics(name):
    support, labels, _, _ = task()
    head, first = make_head(name, {}), labels < 2
    found = head.merged(head.statistics(support[first], labels[first], 2), head.statistics(support, labels, 3))
    twice = head.statistics(torch.cat([support[first], support]), torch.cat([labels[first], labels]), 3)
    for key, value in twice.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_only_transductive_heads_look_at_other_queries(name):
    support, labels, query, _ = task(spread=1.0)
    head = make_head(name, {})
    whole, part = head.classify(support, labels, 3, query), head.classify(support, labels, 3, query[:4])
    assert head.transductive == name.startswith("transductive_")
    assert torch.allclose(whole[:4], part, atol=1e-4) != head.transductive


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite(name):
    support, labels, query, truth = task()
    support.requires_grad_(), query.requires_grad_()
    F.cross_entropy(make_head(name, {}).classify(support, labels, 3, query), truth).backward()
    assert query.grad.isfinite().all() and query.grad.abs().sum() > 0
    assert (support.grad is None) == (name == "logistic_regression")


def test_prototypes_by_hand():
    support, labels = torch.tensor([[2.0, 0], [4, 0], [0, 1]]), torch.tensor([0, 0, 1])
    query = torch.tensor([[3.0, 4]])
    cosine = PrototypeHead("cosine", 0.5).classify(support, labels, 2, query)
    torch.testing.assert_close(cosine, torch.tensor([[1.2, 1.6]]))  # 3/5 and 4/5, twice
    euclidean = make_head("euclidean_prototypes", {}).classify(support, labels, 2, query)
    torch.testing.assert_close(euclidean, torch.tensor([[-4.0, -math.sqrt(18)]]))


def test_lda_by_hand():
    # on the unit circle: 60 and 120 degrees make class 0 with mean (0, s), s = sin 60; class 1 mirrors it below.
    # Each class scatters 2 (1/2)^2 along x; 4 images less 2 classes: S = diag(1/2, 0), mean variance 1/4
    s = math.sqrt(3) / 2
    support = torch.tensor([[0.5, s], [-0.5, s], [0.5, -s], [-0.5, -s]])
    head = DiscriminantHead(shrinkage=0.5)
    logits = head.classify(support, torch.tensor([0, 0, 1, 1]), 2, torch.tensor([[0.6, 0.8]]))
    # covariance diag(1/4 + 1/8, 1/8), so the two classes differ by 2 x 0.8 s / (1/8)
    torch.testing.assert_close(logits[0, 0] - logits[0, 1], torch.tensor(2 * 0.8 * s * 8))


@pytest.mark.parametrize("shrinkage", [0.2, 0.9])
def test_lda_is_that_of_scikit_learn(shrinkage):
    support, labels, query, _ = task(dim=20)
    rows = [F.normalize(part, dim=-1).double().numpy() for part in (support, query)]
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=[1 / 3] * 3)
    expected = oracle.fit(rows[0], labels.numpy()).decision_function(rows[1])
    found = DiscriminantHead(shrinkage).classify(support, labels, 3, query)
    # scikit-learn divides the scatter by the 12 images, we by the 9 degrees of freedom; a constant decides nothing
    expected = torch.from_numpy(expected).float() * 9 / 12
    gaps = [scores - scores.mean(-1, keepdim=True) for scores in (found, expected)]
    torch.testing.assert_close(*gaps, rtol=1e-3, atol=1e-3)


def test_lda_of_one_image_a_class_is_cosine_prototypes():
    support, labels, query, _ = task(shots=1)
    found = DiscriminantHead().classify(support, labels, 3, query).softmax(-1)
    expected = PrototypeHead("cosine", 0.1).classify(support, labels, 3, query).softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_lda_keeps_its_precision_far_from_the_origin():
    support, labels, query, _ = task(dim=20)
    support, query = support * 0.01 + 1, query * 0.01 + 1
    head = DiscriminantHead()
    exact = head.statistics(support, labels, 3)["scatter"]
    halves = [head.statistics(support[part], labels[part], 3) for part in (slice(0, 6), slice(6, 12))]
    torch.testing.assert_close(head.merged(*halves)["scatter"], exact, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("ways", [2, 3])
def test_logistic_regression_is_that_of_scikit_learn(ways):
    support, labels, query, _ = task(ways=ways, queries=6)
    rows = [F.normalize(part, dim=-1).numpy() for part in (support, query)]
    expected = LogisticRegression(C=1.0).fit(rows[0], labels.numpy()).predict_proba(rows[1])
    found = make_head("logistic_regression", {}).classify(support, labels, ways, query).softmax(-1)
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=1e-3, atol=1e-3)


def test_laplacian_by_hand():
    # the middle query lies a little nearer class 1, but between two queries of class 0
    angles = torch.tensor([0.0, math.pi / 2, 0.60, 0.80, 0.70])
    support, query = (torch.stack([part.cos(), part.sin()], 1) for part in (angles[:2], angles[2:]))
    near = nearest_neighbours(query, 1)
    assert near.tolist() == [[0, 0, 1], [0, 0, 1], [1, 0, 0]] or near.tolist() == [[0, 0, 1], [0, 0, 1], [0, 1, 0]]
    assert nearest_neighbours(query, 5).sum(1).tolist() == [2, 2, 2]
    closeness = 2 * query @ support.T
    scores = closeness
    for _ in range(20):  # row by row: each of the three has the other two as neighbours
        weights = scores.softmax(-1)
        scores = torch.stack([closeness[i] + 0.5 * (weights.sum(0) - weights[i]) for i in range(3)])
    labels = torch.tensor([0, 1])
    found = LaplacianHead(neighbours=2, smoothness=0.5, rectify=False).classify(support, labels, 2, query)
    torch.testing.assert_close(found, scores - 1)  # less the prototypes' squared length
    strong = LaplacianHead(neighbours=2, smoothness=5.0, rectify=False).classify(support, labels, 2, query)
    assert closeness.argmax(-1).tolist() == [0, 1, 0] and strong.argmax(-1).tolist() == [0, 0, 0]


def others_task():
    """Support (6, 4) of 3 classes, labels, queries (6, 4), all of unit length: made without random numbers."""
    values = (torch.arange(48.0) ** 1.5).sin().view(12, 4)
    values[:, :3] += 0.8 * torch.eye(3).repeat(4, 1)
    points = F.normalize(values, dim=-1)
    return points[:6], torch.arange(3).repeat(2), points[6:]


def test_laplacian_is_that_of_its_authors():
    """Numbers of `metric_class_type` of github.com/imtiazziko/LaplacianShot at 28cff11 with its `proto_rect`, 3 as
    `knn` (it counts the image itself) and 0.7 as `lmd`, on embeddings of unit length.

    easyfsl's rectification weighs by exp(cosine) instead. It imports torchvision, matplotlib and pandas, which is why
    it is no requirement of the tests.
    """
    support, labels, query = others_task()
    head = LaplacianHead(neighbours=2, smoothness=0.7)
    _, prototypes = laplacian.rectified(query, head.prepare(head.statistics(support, labels, 3)))
    expected = [
        [0.22305004, 0.30204822, 0.23917142, 0.27187196],
        [0.45171729, 0.00232375, 0.37464326, -0.16833738],
        [-0.13226998, 0.54889388, 0.43998759, -0.3132631],
    ]
    torch.testing.assert_close(prototypes, torch.tensor(expected), rtol=0, atol=1e-5)
    expected = [
        [0.5469, 0.2716, 0.1815],
        [0.3229, 0.1959, 0.4812],
        [0.2500, 0.1198, 0.6302],
        [0.2113, 0.6298, 0.1589],
        [0.1899, 0.5690, 0.2410],
        [0.6413, 0.2001, 0.1586],
    ]
    torch.testing.assert_close(
        head.classify(support, labels, 3, query).softmax(-1), torch.tensor(expected), rtol=0, atol=1e-4
    )


def test_rectified_prototypes_by_hand():
    """Support at 0 and 90 degrees, queries at 10, 30 and 80: they move by (1/2, 1/2) less their mean."""
    degrees = torch.tensor([0.0, 90, 10, 30, 80]).deg2rad()
    points = torch.stack([degrees.cos(), degrees.sin()], 1)
    support, query = points[:2], points[2:]
    moved = query + (torch.tensor([0.5, 0.5]) - query.mean(0))
    cosine = F.normalize(moved, dim=-1)  # to the two prototypes, which are the axes
    assert cosine.argmax(-1).tolist() == [0, 0, 1]
    sure = torch.sigmoid(10 * torch.cat([torch.ones(1), (cosine[:, 0] - cosine[:, 1]).abs()]))  # 1st: both support
    first = (sure[0] * support[0] + sure[1] * moved[0] + sure[2] * moved[1]) / 3
    second = (sure[0] * support[1] + sure[3] * moved[2]) / 2
    head = LaplacianHead()
    features, prototypes = laplacian.rectified(query, head.prepare(head.statistics(support, torch.arange(2), 2)))
    torch.testing.assert_close(features, moved)
    torch.testing.assert_close(prototypes, torch.stack([first, second]))
    # fewer queries than classes have no mean to move: the nearest prototype decides
    one = head.classify(support, torch.arange(2), 2, query[1:2])
    torch.testing.assert_close(one, 2 * query[1:2] @ support.T - 1)


@pytest.mark.parametrize("steps", [3, 150])
def test_information_is_that_of_its_authors(steps):
    """Numbers of `TIM_ADM` of github.com/mboudiaf/TIM at d4b3af3 with its settings, `l2` and the temperature 15."""
    support, labels, query = others_task()
    expected = {
        3: [
            [8.5412e-01, 1.4042e-01, 5.4633e-03],
            [1.3067e-01, 6.0633e-03, 8.6326e-01],
            [2.5049e-02, 1.2388e-04, 9.7483e-01],
            [9.7770e-02, 8.8743e-01, 1.4800e-02],
            [1.0876e-01, 8.2994e-01, 6.1297e-02],
            [8.8783e-01, 1.1204e-01, 1.2556e-04],
        ],
        150: [
            [9.9939e-01, 5.9665e-04, 1.7276e-05],
            [1.4259e-03, 1.5556e-08, 9.9857e-01],
            [1.5313e-02, 3.8673e-11, 9.8469e-01],
            [4.1714e-02, 9.5824e-01, 4.3540e-05],
            [1.2786e-02, 9.8099e-01, 6.2289e-03],
            [9.8347e-01, 1.6533e-02, 1.1684e-08],
        ],
    }[steps]
    found = InformationHead(temperature=15.0, steps=steps).classify(support, labels, 3, query).softmax(-1)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)


def test_information_makes_shares_even_and_queries_certain():
    support, labels, query, _ = task(spread=0.8)

    def objective(steps):
        found = InformationHead(steps=steps).classify(support, labels, 3, query).log_softmax(-1)
        shares = found.exp().mean(0)
        return float(0.1 * -(found.exp() * found).sum(-1).mean() + (shares * shares.log()).sum())

    assert objective(150) < objective(1) < objective(0)


def test_sinkhorn_has_its_marginals_and_the_form_of_the_optimum():
    cost = torch.rand(2, 3, 6)
    plan = sinkhorn(cost, entropy=0.5, iterations=100)
    torch.testing.assert_close(plan.sum(-1), torch.full((2, 3), 1 / 3))
    torch.testing.assert_close(plan.sum(-2), torch.full((2, 6), 1 / 6))
    # the optimum is diag(u) exp(-cost / entropy) diag(v): what remains of its logarithm has rank one in sums
    rest = plan.log() + cost / 0.5
    rest = rest - rest[:, :1] - rest[:, :, :1] + rest[:, :1, :1]
    torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-5)


def test_sinkhorn_by_hand():
    # two by two, cost 0 on the diagonal and 1 beside it: the diagonal gets 1 / (1 + exp(-1 / entropy)) of each half
    share = 0.5 / (1 + math.exp(-2.0))
    expected = torch.tensor([[share, 0.5 - share], [0.5 - share, share]])
    torch.testing.assert_close(sinkhorn(1 - torch.eye(2), entropy=0.5, iterations=50), expected)


def test_sinkhorn_with_little_entropy_is_the_assignment():
    cost = torch.rand(5, 5, generator=torch.Generator().manual_seed(1))
    rows, columns = linear_sum_assignment(cost.numpy())
    expected = torch.zeros(5, 5)
    expected[rows, columns] = 1 / 5
    torch.testing.assert_close(sinkhorn(cost, entropy=0.004, iterations=2000), expected, rtol=0, atol=0.01)


def test_transport_moves_the_prototypes_to_the_queries():
    # one shot lies at the edge of its class: the nearest prototype misses the query at 50 degrees, transport does not
    degrees = torch.tensor([-30.0, 75, 0, 20, 50, 70, 80, 90]).deg2rad()
    points = torch.stack([degrees.cos(), degrees.sin()], 1)
    support, query = points[:2], points[2:]
    assert PrototypeHead().classify(support, torch.arange(2), 2, query).argmax(-1).tolist() == [0, 0, 1, 1, 1, 1]
    found = TransportHead().classify(support, torch.arange(2), 2, query)
    assert found.argmax(-1).tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(DataError, match="at least as many queries as classes: got 1 for 2"):
        TransportHead().classify(support, torch.arange(2), 2, query[:1])


def test_two_layers_of_unrolled_em_by_hand():
    support, labels = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([0, 1])
    query = torch.tensor([[0.8, 0.6], [0.6, 0.8], [1, 0]])
    head = UnrolledEMHead(scale=2.0, balance=(1.0, 3.0), temperature=(1.0, 0.5))
    first = (-2 * torch.cdist(query, support).square()).softmax(-1)  # scale^2 / 2, equal shares
    shares = first.mean(0)
    means = torch.stack([(support[c] + first[:, c] @ query) / (1 + first[:, c].sum()) for c in range(2)])
    expected = ((3 * shares.log() - 2 * torch.cdist(query, means).square()) / 0.5).softmax(-1)
    torch.testing.assert_close(head.classify(support, labels, 2, query).softmax(-1), expected)


def test_the_support_of_em_weighs_what_its_images_weigh():
    """Two unit images at +-60 degrees have the mean (1/2, 0), which counts as two images: not one of length 1."""
    s = math.sqrt(3) / 2
    support, labels = torch.tensor([[0.5, s], [0.5, -s], [-0.5, s], [-0.5, -s]]), torch.tensor([0, 0, 1, 1])
    query = torch.tensor([[1.0, 0], [-1, 0], [0, 1]])
    head = UnrolledEMHead(scale=2.0, balance=(1.0, 1.0), temperature=(1.0, 1.0))
    start = torch.tensor([[0.5, 0.0], [-0.5, 0.0]])
    first = (-2 * torch.cdist(query, start).square()).softmax(-1)
    means = torch.stack([(2 * start[c] + first[:, c] @ query) / (2 + first[:, c].sum()) for c in range(2)])
    expected = (first.mean(0).log() - 2 * torch.cdist(query, means).square()).softmax(-1)
    torch.testing.assert_close(head.classify(support, labels, 2, query).softmax(-1), expected)


def test_more_shots_hold_the_means_of_em_back():
    support, labels, query, _ = task(ways=2, shots=1, queries=6, spread=1.0)
    many = support.repeat(1000, 1)
    head = UnrolledEMHead(scale=3.0, balance=(1e-6,), temperature=(1.0,))
    held = UnrolledEMHead(scale=3.0, balance=(1e-6,) * 5, temperature=(1.0,) * 5)
    still = head.classify(support, labels, 2, query).softmax(-1)  # one layer moves nothing yet
    found = held.classify(many, labels.repeat(1000), 2, query).softmax(-1)
    torch.testing.assert_close(found, still, rtol=0, atol=0.02)


def test_settings_reach_the_head():
    settings = {
        "metric": "euclidean",
        "temperature": 2.0,
        "head_parameters": {"transductive_em": {"scale": 5.0}, "prototypes": {"temperature": 0.3}},
    }
    head = make_head("prototypes", settings)
    assert (head.metric, head.temperature) == ("euclidean", 0.3)
    assert make_head("transductive_em", settings).scale == 5.0
    assert make_head("cosine_prototypes", settings).metric == "cosine"
    with pytest.raises(ConfigError, match="Unknown head 'knn'. There are prototypes, .*, transductive_em"):
        make_head("knn", {})
    with pytest.raises(ConfigError, match="The head lda cannot be made with .*'depth'"):
        make_head("lda", {"head_parameters": {"lda": {"depth": 3}}})
    with pytest.raises(ConfigError, match="shrinkage must lie above 0 and be at most 1, got 1.5"):
        make_head("lda", {"head_parameters": {"lda": {"shrinkage": 1.5}}})
    for wrong, message in (({"steps": 2000}, "at most 1000"), ({"certainty": 0.0}, "must be positive")):
        with pytest.raises(ConfigError, match=message):
            make_head("transductive_information", {"head_parameters": {"transductive_information": wrong}})
    with pytest.raises(ConfigError, match="one number for each layer, got 2 and 10"):
        make_head("transductive_em", {"head_parameters": {"transductive_em": {"balance": [1, 1]}}})
