// What may become elements of the page: a few tags, links to the web, and the classes that colour code.

import DOMPurify from "../vendor/dompurify.js";

const RULES = {
  ALLOWED_TAGS:
    "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre span strong table tbody td th thead tr ul".split(" "),
  ALLOWED_ATTR: ["href", "title", "align", "start", "class"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const CLASSES = { CODE: /^language-[\w+#.-]+$/, SPAN: /^hljs-[\w -]+$/ };

DOMPurify.addHook("uponSanitizeAttribute", (node, data) => {
  if (data.attrName === "class" && !CLASSES[node.nodeName]?.test(data.attrValue)) data.keepAttr = false;
});

/** The elements that `html` describes, as a fragment, without all that is not allowed. */
export function sanitised(html) {
  return DOMPurify.sanitize(html, RULES);
}
