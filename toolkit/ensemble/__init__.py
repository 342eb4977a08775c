"""What combine applies is trained and searched here: experts, bags, boosted rounds, weights, routers and gates."""
