// Conversations in this browser: an IndexedDB of this page's address. Without one they last until the page is closed.

const NAME = "specplug";
const STORE = "conversations";
let opened = null;

/** Whether conversations outlast the page. */
export async function lasts() {
  return (await database()) !== null;
}

/** All conversations. */
export async function loadAll() {
  return (await run("readonly", (store) => store.getAll())) ?? [];
}

export function save(conversation) {
  return run("readwrite", (store) => store.put(conversation));
}

export function remove(id) {
  return run("readwrite", (store) => store.delete(id));
}

export function removeAll() {
  return run("readwrite", (store) => store.clear());
}

function database() {
  opened ??= new Promise((resolve) => {
    try {
      const request = indexedDB.open(NAME, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => resolve(null);
    } catch {
      resolve(null);
    }
  });
  return opened;
}

/** The result of a request to the store; null without a database, or where it fails, as it does when it is full. */
async function run(mode, ask) {
  const base = await database();
  if (!base) return null;
  return new Promise((resolve) => {
    try {
      const transaction = base.transaction(STORE, mode),
        request = ask(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = () => resolve(null);
    } catch {
      resolve(null);
    }
  });
}
