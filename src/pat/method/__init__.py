"""The method itself in pure torch: operators, the unified mask, its schedule, the regularisers."""
