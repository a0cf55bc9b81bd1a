"""Bases whose file holds codes and scales: each weight is dequantized when it is read, under its plain name."""
