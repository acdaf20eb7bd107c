"""What a technique puts in the place of a model's `save_pretrained` when the parameters are not the official ones."""


class SaveWrapper:
    """Changes what is saved, then saves by what stood there before: the class's method, or another wrapper."""

    def __init__(self, model):
        self.model = model
        self.replaced = vars(model).get("save_pretrained")
        model.save_pretrained = self

    def __call__(self, save_directory, is_main_process: bool = True, state_dict: dict | None = None, **kwargs):
        """As `PreTrainedModel.save_pretrained`."""
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        return self.save(save_directory, is_main_process, state_dict=dict(state_dict), **kwargs)

    def save(self, save_directory, is_main_process: bool, state_dict: dict, **kwargs):
        """Overridden to change `state_dict`, a copy, and what lies around it."""
        save = self.replaced or type(self.model).save_pretrained.__get__(self.model)
        return save(save_directory, is_main_process, state_dict=state_dict, **kwargs)

    def remove(self) -> None:
        """Takes this wrapper off the model; wrappers that were put on later stay."""
        outer = vars(self.model).get("save_pretrained")
        if outer is not self:
            while outer.replaced is not self:
                outer = outer.replaced
            outer.replaced = self.replaced
        elif self.replaced is None:
            del self.model.save_pretrained
        else:
            self.model.save_pretrained = self.replaced
