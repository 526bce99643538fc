"""What both compilers take: the language, the rules, the penalties and the order of a step."""
