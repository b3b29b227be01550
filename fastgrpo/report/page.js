"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const modelOf = (name) => Bokeh.documents[0].get_model_by_name(name);

  // an average of what was before: value (1 - s) + average s, divided by the weights that there are so far
  function smooth(values, s) {
    if (s === 0) return values.slice();
    const smoothed = new Float64Array(values.length);
    let average = 0, weight = 0;
    for (let i = 0; i < values.length; i++) {
      average = s * average + (1 - s) * values[i];
      weight = s * weight + (1 - s);
      smoothed[i] = average / weight;
    }
    return smoothed;
  }

  function redraw() {
    const axis = document.querySelector("input[name=axis]:checked").value;
    const smoothing = document.getElementById("smoothing");
    document.querySelector("output[for=smoothing]").value = smoothing.value;
    for (const name of data.handles.sources) {
      const source = modelOf(name);
      source.data = {...source.data, x: source.data[axis], y: smooth(source.data.value, Number(smoothing.value))};
    }
    for (const name of data.handles.axes) modelOf(name).axis_label = data.axes[axis];
  }

  function showRun(box) {
    for (const name of data.handles[`run ${box.value}`] || []) modelOf(name).visible = box.checked;
  }

  for (const input of document.querySelectorAll("input[name=axis], #smoothing")) input.addEventListener("input", redraw);
  for (const box of document.querySelectorAll("input[name=run]")) box.addEventListener("input", () => showRun(box));

  function show(pair, which, entry) {
    const [iteration, image, scores, verified] = entry;
    const picture = pair.querySelector(`img.${which}`), text = pair.querySelector(`small.${which}`);
    picture.src = data.gallery.images[image];
    picture.alt = `after iteration ${iteration}`;
    // few pixels are shown as they are
    picture.onload = () => picture.classList.toggle("pixels", picture.naturalWidth <= 128);
    text.replaceChildren();
    if (verified !== null) {
      const mark = document.createElement("span");
      mark.className = verified ? "right" : "wrong";
      mark.textContent = verified ? "✓ " : "✗ ";
      text.append(mark);
    }
    const said = Object.entries(scores).map(([name, value]) => `${name} ${value === null ? "–" : value.toPrecision(3)}`);
    text.append([`iteration ${iteration}`, ...said].join("\n"));
  }

  function showEvaluation() {
    const step = data.gallery.steps[Number(slider.value)];
    document.querySelector("output[for=evaluation]").value = step;
    for (const card of document.querySelectorAll(".prompt")) {
      for (const pair of card.querySelectorAll(".pair")) {
        const entries = data.gallery.cards[card.dataset.card][pair.dataset.run];
        show(pair, "before", entries[0]);
        // a run that begins with a later evaluation shows that one
        show(pair, "after", entries.filter(([iteration]) => iteration <= step).at(-1) || entries[0]);
      }
    }
  }

  const slider = document.getElementById("evaluation");
  if (slider) {
    slider.addEventListener("input", showEvaluation);
    showEvaluation();
  }
})();
