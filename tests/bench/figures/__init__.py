# SPDX-License-Identifier: Apache-2.0
"""The figures. Each module holds FIGURES, what it can measure, and measure(); see figure.py."""
