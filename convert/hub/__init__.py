"""The Hugging Face Hub: the model card, the upload and its proof, the code of what is there."""
