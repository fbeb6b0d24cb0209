"""What is read as text: corpora, text the adapted source model writes itself, and mixtures."""

from .corpus import C4, Corpus, read_corpus
from .effort import Effort, effort_of
from .judged import token_nats_of
from .mixture import Mixture, check_all_reached, check_texts, is_written, read_text
from .ranking import Tried, answer_of, by_form, in_turn, mean_acts, ranked
from .reading import ANCHOR_EVERY, PairTexts, anchor_length, how_many_held_out, read_fit_texts, read_texts
from .samples import TextSample, align_samples
from .shown import EXAMPLES, align_shown, come_to_an_end, group_size, shown_prompts
from .survey import DOCUMENTS, ENOUGH_PROMPTS, Survey, Surveyor, compared, write_survey
from .written import Keep, SelfWritten, check_prompts_given, write_answers, write_texts
