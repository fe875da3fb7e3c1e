(() => {
  const specs = JSON.parse(document.getElementById("figures").textContent);
  const options = { mode: "vega-lite", renderer: "svg", actions: false };
  for (const place of document.querySelectorAll("[data-figure]")) {
    vegaEmbed(place, specs[place.dataset.figure], options).catch((error) => {
      place.textContent = "This figure could not be drawn: " + error.message;
    });
  }
  // Paper has nothing to click on.
  window.addEventListener("beforeprint", () => {
    for (const closed of document.querySelectorAll("#answers details")) closed.open = true;
  });
})();
