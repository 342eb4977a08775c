"""Every way of combining, described once: what docs, recipes and reports say about it. Knows no tensor."""

from dataclasses import dataclass

from toolkit.errors import InputError, Problem


@dataclass(frozen=True)
class Method:
    """One way of combining.

    kind: merge | mix | vote. formula: plain text, with w for weights and k over the members. training: what has to be
    learnt or searched before. serving: what an answer costs, against one adapter.
    """

    kind: str
    name: str
    says: str
    formula: str
    paper: str
    training: str
    serving: str


FREE = "Nothing beside the members. Weights may be given, or searched: one evaluation a try."
AS_ONE = "As one adapter"

METHODS: tuple[Method, ...] = (
    Method(
        kind="merge",
        name="exact",
        says="The weighted sum of the updates, with nothing lost: factors stand side by side, so ranks, alphas and "
        "scalings may differ. Also for reft (edits) and embedding (deltas).",
        formula="D = sum_k w_k s_k B_k A_k; s = alpha / rank, or alpha / sqrt(rank)",
        paper="Ilharco et al., Editing Models with Task Arithmetic, arXiv 2212.04089",
        training=FREE,
        serving=f"{AS_ONE} whose rank is the sum of the members' ranks.",
    ),
    Method(
        kind="merge",
        name="svd",
        says="The update of a given rank that lies nearest to the exact sum.",
        formula="D = U_r S_r V_r^T, the r largest singular values of sum_k w_k s_k B_k A_k",
        paper="Eckart and Young, The approximation of one matrix by another of lower rank, Psychometrika 1(3), 1936",
        training=FREE,
        serving=f"{AS_ONE} of the rank asked for (default: the largest of the members').",
    ),
    Method(
        kind="merge",
        name="linear",
        says="A is added to A and B to B, for members of one rank; then each layer is scaled to lie as near to the "
        "exact sum as it can, without which equal members at half a weight each would come out doubled.",
        formula="D = c (sum_k sqrt(w_k s_k) B_k) (sum_k sqrt(w_k s_k) A_k); c = <D', exact> / <D', D'> for D' = D / c",
        paper="Zhang et al., Composing Parameter-Efficient Modules with Arithmetic Operations, arXiv 2306.14870",
        training=FREE,
        serving=f"{AS_ONE} of the members' rank.",
    ),
    Method(
        kind="merge",
        name="ties",
        says="Of each update only the largest numbers stay; for each number the members elect a sign by weight; those "
        "that agree are averaged.",
        formula="D = W sum_k m_k w_k T_k / sum_k m_k |w_k|; T = trimmed update, m = agrees with sign(sum_k w_k T_k), "
        "W = sum_k |w_k|",
        paper="Yadav et al., TIES-Merging: Resolving Interference When Merging Models, arXiv 2306.01708",
        training=FREE,
        serving=f"{AS_ONE} of the rank asked for (default: the sum of the members').",
    ),
    Method(
        kind="merge",
        name="dare_linear",
        says="Numbers of each update are dropped at random and the others enlarged to match; then the weighted sum.",
        formula="D = sum_k w_k Z_k D_k / density; Z = 1 with probability density, else 0",
        paper="Yu et al., Language Models are Super Mario (DARE), arXiv 2311.03099",
        training=FREE,
        serving=f"{AS_ONE} of the rank asked for (default: the sum of the members').",
    ),
    Method(
        kind="merge",
        name="dare_ties",
        says="Numbers are dropped at random as by dare_linear, then signs are elected as by ties.",
        formula="D = W sum_k m_k w_k T_k / sum_k m_k |w_k|; T_k = Z_k D_k / density, m and W as in ties",
        paper="Yu et al., arXiv 2311.03099; Yadav et al., arXiv 2306.01708",
        training=FREE,
        serving=f"{AS_ONE} of the rank asked for (default: the sum of the members').",
    ),
    Method(
        kind="merge",
        name="magnitude_prune",
        says="Of each update only the largest numbers stay; then the weighted sum.",
        formula="D = sum_k w_k T_k; T = the share density of an update that is largest in magnitude",
        paper="Han et al., Learning both Weights and Connections for Efficient Neural Networks, arXiv 1506.02626",
        training=FREE,
        serving=f"{AS_ONE} of the rank asked for (default: the sum of the members').",
    ),
    Method(
        kind="mix",
        name="logprob",
        says="At every token the members' log-probabilities are averaged: what one of them excludes is excluded. A "
        "negative weight turns the answer away from a member (arXiv 2105.03023).",
        formula="p(t) ~ prod_k p_k(t)^w_k; sum_k w_k = 1",
        paper="Hinton, Training Products of Experts by Minimizing Contrastive Divergence, Neural Comp. 14(8), 2002",
        training=FREE,
        serving="One row of the batch for each member: K rows a token, in one forward pass.",
    ),
    Method(
        kind="mix",
        name="prob",
        says="At every token the members' probabilities are averaged: what one of them wants stays possible.",
        formula="p(t) = sum_k w_k p_k(t); w_k >= 0, sum_k w_k = 1",
        paper="Jacobs, Jordan, Nowlan and Hinton, Adaptive Mixtures of Local Experts, Neural Computation 3(1), 1991",
        training=FREE,
        serving="One row of the batch for each member: K rows a token, in one forward pass.",
    ),
    Method(
        kind="vote",
        name="hard",
        says="Each member votes for the label that it finds likeliest; ties go to the label that stands first.",
        formula="argmax_l sum_k w_k [l = argmax_m p_k(m)]",
        paper="Dietterich, Ensemble Methods in Machine Learning, Multiple Classifier Systems, 2000",
        training=FREE,
        serving="Each member scores every label: K times one adapter.",
    ),
    Method(
        kind="vote",
        name="soft",
        says="The members' probabilities of each label are averaged.",
        formula="argmax_l sum_k w_k p_k(l)",
        paper="Kittler et al., On Combining Classifiers (sum rule), IEEE PAMI 20(3), 1998",
        training=FREE,
        serving="Each member scores every label: K times one adapter.",
    ),
    Method(
        kind="vote",
        name="logprob",
        says="The members' log-probabilities of each label are averaged.",
        formula="argmax_l sum_k w_k log p_k(l)",
        paper="Kittler et al., On Combining Classifiers (product rule), IEEE PAMI 20(3), 1998",
        training=FREE,
        serving="Each member scores every label: K times one adapter.",
    ),
    Method(
        kind="vote",
        name="majority",
        says="Each member answers as a whole; the answer that most give wins, whatever its case, spaces and final "
        "punctuation. Ties go to the answer that stands first.",
        formula="argmax_a sum_k w_k [a = normalised(answer_k)]",
        paper="Wang et al., Self-Consistency Improves Chain of Thought Reasoning in Language Models, arXiv 2203.11171",
        training=FREE,
        serving="Each member answers: K rows a token, in one batch; nothing can be shown before all have ended.",
    ),
)


def names_of(kind: str) -> tuple[str, ...]:
    """The methods of a kind, in the order in which they are described."""
    return tuple(method.name for method in METHODS if method.kind == kind)


def method_named(kind: str, name: str) -> Method:
    """The description of a method. Raises: InputError for one that there is not, with those that there are."""
    found = next((method for method in METHODS if (method.kind, method.name) == (kind, name)), None)
    if found is None:
        raise InputError(kind, [Problem("", f"'{name}' is no method. Use one of: {', '.join(names_of(kind))}.")])
    return found
