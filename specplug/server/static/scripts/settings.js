// The settings, their dialog, and where they are kept.

import { byId } from "./elements.js";

const KEY = "specplug-settings";
const DEFAULTS = { system: "", temperature: 0, maxTokens: 1024, drafting: true, keep: true };

export const settings = { ...DEFAULTS, ...stored() };

/** Open the dialog when its button is pressed. `system()` is the prompt to show; `saved()` follows a change. */
export function useDialog(system, saved) {
  const dialog = byId("settings");
  byId("show-settings").addEventListener("click", () => {
    byId("system").value = system();
    byId("temperature").value = settings.temperature;
    byId("tokens").value = settings.maxTokens;
    byId("drafting").checked = settings.drafting;
    byId("keep").checked = settings.keep;
    dialog.showModal();
  });
  byId("cancel-settings").addEventListener("click", () => dialog.close());
  byId("settings-form").addEventListener("submit", (event) => {
    event.preventDefault();
    settings.system = byId("system").value;
    settings.temperature = byId("temperature").valueAsNumber;
    settings.maxTokens = byId("tokens").valueAsNumber;
    settings.drafting = byId("drafting").checked;
    settings.keep = byId("keep").checked;
    try {
      localStorage.setItem(KEY, JSON.stringify(settings));
    } catch {
      /* without storage they last until a reload */
    }
    dialog.close();
    saved();
  });
}

function stored() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? {};
  } catch {
    return {};
  }
}
