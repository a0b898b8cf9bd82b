# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks are made of: a fleet of real guests under one of two engines, and readers of
what the kernel says about it. Measures, and never judges: that is for the figures."""
