"""Real processes killed at named points of their own code, brought back, and judged by their files."""
