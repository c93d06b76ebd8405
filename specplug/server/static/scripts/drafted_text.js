// The text of an answer as it was generated, with the parts that proposers drafted marked, and what the marks mean.

import { make } from "./elements.js";

const STYLES = 4; // that the style sheet has
let proposers = [];

/** Set the order of the proposers, on which their colours depend. */
export function setProposers(names) {
  proposers = names;
}

/** Text with the colour of a proposer. */
export function marked(text, proposer) {
  if (!proposers.includes(proposer)) proposers = [...proposers, proposer];
  return make(
    "mark",
    { class: `proposer-${proposers.indexOf(proposer) % STYLES}`, title: `drafted by ${proposer}` },
    text,
  );
}

/** Shows the segments of an answer; `update` adds those that are new. */
export class DraftedView {
  constructor(element) {
    this.text = make("div", { class: "source", dir: "auto" });
    this.explanation = make("p", { class: "small" });
    element.replaceChildren(this.text, this.explanation);
    this.shown = 0;
  }

  update(answer) {
    const { segments } = answer;
    if (this.shown) this.text.lastChild.remove(); // it may have grown
    for (const [text, proposer] of segments.slice(Math.max(this.shown - 1, 0))) {
      this.text.append(proposer ? marked(text, proposer) : document.createTextNode(text));
    }
    this.shown = segments.length;
    this.explanation.replaceChildren(...explanation(answer));
  }
}

function explanation({ segments, figures }) {
  const names = [...new Set(segments.map(([, proposer]) => proposer).filter(Boolean))];
  if (!names.length) return ["Nothing of this answer was drafted: the model made one pass for each token."];
  const said = [
    "Marked text was drafted without the model by ",
    ...names.flatMap((name, index) => (index ? [", ", marked(name, name)] : [marked(name, name)])),
    ". The model then checked it, several tokens in one pass, and kept only what it would have written itself.",
  ];
  if (figures?.steps) {
    said.push(
      ` ${figures.accepted_tokens} of ${figures.draft_tokens} drafted tokens were kept: ` +
        `${figures.mean_acceptance_length.toFixed(2)} tokens per pass of the model.`,
    );
  }
  return said;
}
