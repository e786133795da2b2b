"""How fast Finedeep is beside dense Llama of the same sizes, and beside a loop over experts: measured, not claimed."""
