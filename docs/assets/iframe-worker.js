/* Makes the search work from disk, where browsers start no workers: runs the script in a hidden frame that passes messages like a worker.
 * On a server, the browser's own workers are used. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const frameWindow = this.frame.contentWindow;
      frameWindow.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = frameWindow.document.createElement("script");
      script.src = url;
      this.loaded = new Promise((loaded) => script.addEventListener("load", loaded));
      frameWindow.document.head.append(script);
    }

    async postMessage(data) {
      await this.loaded;
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
